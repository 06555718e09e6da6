# SPDX-License-Identifier: Apache-2.0
"""Whether descriptions and tensors tell of the same linears."""

import re
from collections import Counter
from collections.abc import Iterator

from jqx_interop.checkpoints.checks import MODEL_DTYPES

from .descriptions import FILE, unmatched_targets
from .facts import Facts
from .matching import matcher
from .problem import WARNING, first
from .rule import Finding
from .schemes import FLOAT, MARKS

VISION = re.compile(r"(^|\.)(vision\w*|visual|multi_modal_projector|mm_projector|image_\w+)\.")
"""What models build unquantized whatever is listed."""

ROUTERS = ("gate", "router", "shared_expert_gate")
"""What some models build unquantized, and others do not."""


def lists(facts: Facts) -> Iterator[Finding]:
    """Two lists that differ: of no consequence where linears are the same."""
    if not facts.said.lists or set(facts.said.lists[0]) == set(facts.said.lists[1]):
        return
    here, there = (set(names) for names in facts.said.lists)
    means = [matcher(facts.layout, None, names) for names in facts.said.lists]
    left = [{p for p in facts.linears if ignored(p, (p,))} for ignored in means]
    text = f"config.json and {FILE} do not leave the same modules alone: {first(here ^ there)}"
    yield Finding(text=text, loads=left[0] == left[1])


def excluded(facts: Facts) -> Iterator[str]:
    """Linears that have codes and should have none; a description that says nothing that can be
    read says nothing of them.
    """
    said = facts.said
    if not said.groups and not said.layers and any(r == "description" for r, _ in said.problems):
        return
    for path, linear in facts.linears.items():
        if linear.group is None and linear.quantized and facts.said.understood:
            told = (
                "the descriptions leave it alone"
                if facts.said.described
                else "nothing describes it"
            )
            leaf = next((name for name in linear.leaves if name in MARKS), "weight")
            yield f"{path}.{leaf}: {path} is quantized, and {told}"


def unlisted(facts: Facts) -> Iterator[Finding]:
    """Linears that should have codes. One whose name no quantized linear has may be something that
    engines never quantize.
    """
    names = {path.rpartition(".")[2] for path, x in facts.linears.items() if x.quantized}
    for path, linear in facts.linears.items():
        if linear.group is None or linear.quantized or linear.kind == "experts":
            continue
        name = path.rpartition(".")[2]
        sure = (path in facts.shapes and name not in ROUTERS) or name in names or path == "lm_head"
        sure = sure and not VISION.search(path)
        weight = linear.leaves.get("weight")
        told = "has no weight" if weight is None else f"is stored as {weight.dtype}"
        yield Finding(
            text=f"{path} {told}, and the descriptions say {linear.group.scheme}",
            severity=None if sure else WARNING,
        )


def dtype(facts: Facts) -> Iterator[Finding]:
    """A dtype of config.json that is none, or not that of the tensors."""
    config = facts.files.config
    said = next((config[key] for key in ("dtype", "torch_dtype") if config.get(key)), None)
    if said is None:
        return
    wanted = MODEL_DTYPES.get(str(said).removeprefix("torch."))
    if wanted is None:
        yield Finding(text=f"config.json has dtype {said!r:.40}, which is none")
        return
    sizes: Counter[str] = Counter()
    for info in facts.rest.values():
        sizes.update({info.dtype: info.nbytes} if info.dtype in FLOAT else {})
    most = sizes.most_common(1)
    if most and most[0][0] != wanted:
        text = f"config.json has dtype {said}, and most of what is not quantized is {most[0][0]}"
        yield Finding(text=text, severity=WARNING)


def unmatched(facts: Facts) -> Iterator[str]:
    """Linears that are described and are not there."""
    for path in unmatched_targets(facts.said, list(facts.linears)) if facts.whole else ():
        inside = any(linear.startswith(path + ".") for linear in facts.linears)
        if not inside:
            yield f"{path} is described as quantized and is no linear of the checkpoint"


def ignores_nothing(facts: Facts) -> Iterator[str]:
    """Entries of the list that match no module; patterns for what a model may have are usual."""
    names = set(facts.linears) | {name.rpartition(".")[0] for name in facts.rest}
    every = "\n".join(names)
    for entry in facts.said.ignored:
        plain = not entry.startswith("re:") and not set(entry) & set("*?[")
        if plain and "." in entry and entry not in every:
            yield f"{entry} is listed to be left alone, and the checkpoint has no such module"
