# SPDX-License-Identifier: Apache-2.0
"""INTRINSIC: what makes a checkpoint faulty whoever reads it.

Rules on files and descriptions hand on what was met in reading them; those on tensors compare them
with what the descriptions promise.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from jqx_interop.checkpoints.checks import MODEL_DTYPES

from .descriptions import unmatched
from .facts import EXPERT, Facts, kv_leaves
from .numbers import Numbers
from .problem import WARNING, first
from .rule import Finding, Rule
from .schemes import FLOAT
from .tensor_rules import TENSOR_RULES

QUANTIZE = "write the checkpoint again from the original"
COPY = "copy the file again, or write the checkpoint again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What intrinsic rules look at."""

    facts: Facts
    numbers: Numbers


def _met(rule: str) -> Callable[[Seen, Any], Iterable[str]]:
    """What was met under the name of `rule` when files and descriptions were read."""

    def check(seen: Seen, engine: object) -> Iterator[str]:
        facts = seen.facts
        for name, text in (*facts.files.problems, *facts.said.problems):
            if name == rule:
                yield text

    return check


def _on_facts(check: Callable[[Facts], Iterable[str | Finding]]) -> Callable[[Seen, Any], Any]:
    return lambda seen, engine: check(seen.facts)


def _excluded(facts: Facts) -> Iterator[str]:
    for path, linear in facts.linears.items():
        if linear.group is None and linear.quantized and facts.said.understood:
            told = (
                "the descriptions leave it alone"
                if facts.said.described
                else "nothing describes it"
            )
            leaf = next((name for name in linear.leaves if name != "weight"), "weight")
            yield f"{path}.{leaf}: {path} is quantized, and {told}"


def _unlisted(facts: Facts) -> Iterator[Finding]:
    """Linears that should have codes. One whose name no quantized linear has may be something that
    engines never quantize.
    """
    names = {path.rpartition(".")[2] for path, x in facts.linears.items() if x.quantized}
    for path, linear in facts.linears.items():
        if linear.group is None or linear.quantized or linear.kind == "experts":
            continue
        sure = facts.spec is not None or path.rpartition(".")[2] in names or path == "lm_head"
        weight = linear.leaves.get("weight")
        told = "has no weight" if weight is None else f"is stored as {weight.dtype}"
        yield Finding(
            text=f"{path} {told}, and the descriptions say {linear.group.scheme}",
            severity=None if sure else WARNING,
        )


def _experts(facts: Facts) -> Iterator[str]:
    """Experts that were left out: some of a layer, or all of them without being listed."""
    layers: dict[tuple[str, str], list[tuple[str, bool]]] = {}
    for path, linear in facts.linears.items():
        if match := EXPERT.fullmatch(path):
            layers.setdefault((match[1], match[3]), []).append((path, linear.quantized))
        elif linear.kind == "experts" and linear.group is not None and not linear.quantized:
            yield f"{path} is not quantized, and no description leaves it alone"
    for (layer, name), experts in layers.items():
        plain = [path for path, quantized in experts if not quantized]
        if plain and len(plain) < len(experts):
            yield (
                f"{len(plain)} of {len(experts)} experts of {layer} have {name} as it was, others "
                f"are quantized: {first(plain)}"
            )
        elif plain and all(facts.linears[path].group is not None for path in plain):
            yield f"no {name} of {layer} is quantized, and no description leaves them alone"


def _kv_pairs(facts: Facts) -> Iterator[str]:
    found: dict[tuple[str, str], dict[str, str]] = {}
    for module, leaf, info in kv_leaves(facts):
        parent = module
        found.setdefault((parent, leaf[2:]), {})[leaf[0]] = info.name
    for (_, leaf), pair in found.items():
        for letter, other in (("k", "v"), ("v", "k")):
            if letter in pair and other not in pair:
                yield f"{pair[letter]} is there, and no {other}_{leaf} beside it"


def _kv_said(facts: Facts) -> Iterator[str]:
    names = [info.name for _, _, info in kv_leaves(facts)]
    if names and facts.said.kv is None:
        yield f"{first(names)}: scales of keys and values that no description mentions"


def _dtype(facts: Facts) -> Iterator[Finding]:
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


def _unmatched(facts: Facts) -> Iterator[str]:
    for path in unmatched(facts.said, list(facts.linears)) if facts.whole else ():
        inside = any(linear.startswith(path + ".") for linear in facts.linears)
        if not inside:
            yield f"{path} is described as quantized and is no linear of the checkpoint"


def _bad(seen: Seen, engine: object) -> Iterable[str]:
    return seen.numbers.bad


def _odd(seen: Seen, engine: object) -> Iterable[str]:
    return seen.numbers.odd


def _matrix(seen: Seen, engine: object) -> Iterator[str]:
    """Stored shapes that are not those of the codes."""
    for name, shape in seen.numbers.matrices.items():
        linear = seen.facts.linears.get(name.rpartition(".")[0])
        if linear is None or linear.dims is None:
            continue
        n, k, _ = linear.dims
        # codes end with the last whole word, so without a configuration k may be a little less
        known = seen.facts.spec is not None
        fits = len(shape) == 2 and shape[0] == n and (shape[1] == k or (not known and shape[1] < k))
        if not fits or k - shape[1] >= 8:
            yield f"{name} says {list(shape)}, and the codes are of [{n}, {k}]"


def _ignored_nothing(facts: Facts) -> Iterator[str]:
    """Entries of the list that match no module; patterns for what a model may have are usual."""
    names = set(facts.linears) | {name.rpartition(".")[0] for name in facts.rest}
    every = "\n".join(names)
    for entry in facts.said.ignored:
        plain = not entry.startswith("re:") and not set(entry) & set("*?[")
        if plain and "." in entry and entry not in every:
            yield f"{entry} is listed to be left alone, and the checkpoint has no such module"


INTRINSIC: tuple[Rule[Seen], ...] = (
    Rule(name="config", check=_met("config"), source="every engine reads it", way_out=COPY),
    Rule(name="shard", check=_met("shard"), source="the safetensors format", way_out=COPY),
    Rule(
        name="index",
        check=_met("index"),
        source="vLLM 0.32 model_loader/weight_utils.py filter_duplicate_safetensors_files",
        way_out="write the index anew, or remove it where one file holds everything",
    ),
    Rule(
        name="index-extra",
        check=_met("index-extra"),
        source="vLLM 0.32 model_loader/weight_utils.py filter_duplicate_safetensors_files",
        way_out="remove the file, or the index that does not belong to it",
        severity=WARNING,
    ),
    Rule(
        name="index-size",
        check=_met("index-size"),
        source="the index's own metadata",
        way_out="write the index anew",
        stops=False,
    ),
    Rule(
        name="tokenizer",
        check=_met("tokenizer"),
        source="vLLM 0.32: without one it serves token ids alone, with --skip-tokenizer-init",
        way_out="copy the tokenizer's files from the original model",
        stops=False,
        given=True,
    ),
    Rule(
        name="description",
        check=_met("description"),
        source="what ModelOpt 0.47, compressed-tensors, AutoAWQ and GPTQ write",
        way_out=QUANTIZE,
    ),
    Rule(
        name="descriptions-agree",
        check=_met("descriptions-agree"),
        source="vLLM and SGLang read config.json, TensorRT-LLM hf_quant_config.json",
        way_out="keep the two that were written together",
    ),
    Rule(
        name="model-dtype",
        check=_on_facts(_dtype),
        source="vLLM 0.32 and transformers 5.19 compute in that dtype",
        way_out="set dtype in config.json to that of the weights",
        given=True,
    ),
    Rule(
        name="excluded",
        check=_on_facts(_excluded),
        source="engines make a plain linear of it, which has no place for codes",
        way_out="take it off the list of what is left alone, or write it unquantized",
    ),
    Rule(
        name="unlisted",
        check=_on_facts(_unlisted),
        source="engines make a quantized linear of it, and find no scales",
        way_out="list it among what is left alone, or quantize it",
    ),
    Rule(
        name="experts",
        check=_on_facts(_experts),
        source="engines make one matrix of all experts of a layer",
        way_out="quantize all experts of a layer alike, or list all of them",
        given=True,
    ),
    Rule(
        name="described",
        check=_on_facts(_unmatched),
        source="quantized_layers, and targets of config_groups",
        way_out=QUANTIZE,
    ),
    Rule(
        name="ignored-module",
        check=_on_facts(_ignored_nothing),
        source="exclude_modules and ignore name modules of the model",
        way_out="check the name for misprints",
        severity=WARNING,
    ),
    Rule(
        name="kv-pair",
        check=_on_facts(_kv_pairs),
        source="TensorRT-LLM: k_scale and v_scale come together (read, not run)",
        way_out=QUANTIZE,
    ),
    Rule(
        name="kv-described",
        check=_on_facts(_kv_said),
        source="kv_cache_scheme and kv_cache_quant_algo",
        way_out="name the format of keys and values in the descriptions",
        severity=WARNING,
    ),
    Rule(
        name="scale-numbers",
        check=_bad,
        source="a scale is a positive finite number",
        way_out=QUANTIZE,
    ),
    Rule(
        name="scale-magnitude",
        check=_odd,
        source="scales of trained models lie between 1e-12 and 1e6",
        way_out="compare the weights with the original's",
        severity=WARNING,
    ),
    Rule(
        name="matrix-shape",
        check=_matrix,
        source="compressed-tensors: weight_shape is the shape of the matrix",
        way_out=QUANTIZE,
    ),
    *(
        Rule(
            name=rule.name,
            check=_on_facts(rule.check),
            source=rule.source,
            way_out=QUANTIZE,
        )
        for rule in TENSOR_RULES
    ),
)
