# SPDX-License-Identifier: Apache-2.0
"""Whether the experts of a layer are all there and alike, which nothing else tells of models that
are not defined here: engines load them without a word.
"""

import re
from collections import Counter
from collections.abc import Iterator

from .facts import EXPERT, Facts, Linear
from .problem import first

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
Experts = dict[int, dict[str, Linear]]


def left_out(facts: Facts) -> Iterator[str]:
    """Experts that are not quantized: some of a layer, or all of them without being listed."""
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


def missing(facts: Facts) -> Iterator[str]:
    """Experts, or linears of them, that others of the model have."""
    if not facts.whole or facts.shapes:
        return
    layers = _layers(facts)
    most: Counter[str] = Counter()
    for layer, experts in layers.items():
        most[_alike(layer)] = max(most[_alike(layer)], max(experts) + 1)
    for layer, experts in layers.items():
        count = _said(facts, most[_alike(layer)])
        gone = sorted(set(range(count)) - set(experts))
        if gone:
            yield f"{layer}.{gone[0]} is missing ({len(gone)} of {count} experts of the layer are)"
        names = {name for expert in experts.values() for name in expert}
        for i, expert in experts.items():
            yield from (f"{layer}.{i}.{n} is missing" for n in sorted(names - set(expert)))


def unlike(facts: Facts) -> Iterator[str]:
    """Experts of other sizes than those beside them."""
    for layer, experts in _layers(facts).items() if not facts.shapes else ():
        sizes: dict[str, Counter[tuple[int, ...]]] = {}
        for expert in experts.values():
            for name, linear in expert.items():
                sizes.setdefault(name, Counter()).update([_size(linear)])
        for i, expert in experts.items():
            for name, linear in expert.items():
                usual = sizes[name].most_common(1)[0][0]
                if _size(linear) != usual:
                    text = f"{layer}.{i}.{name} is of {list(_size(linear))}"
                    yield f"{text}, and those of other experts of {list(usual)}"


MOST = 10_000  # a larger number of experts is a damaged name


def _layers(facts: Facts) -> dict[str, Experts]:
    found: dict[str, Experts] = {}
    for path, linear in facts.linears.items():
        match = EXPERT.fullmatch(path)
        if match and len(match[2]) < 6 and int(match[2]) < MOST:
            found.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = linear
    return found


def _alike(layer: str) -> str:
    return re.sub(r"\d+", "#", layer)


def _said(facts: Facts, least: int) -> int:
    """How many experts a layer has."""
    said = (facts.files.config.get(key) for key in COUNTS)
    return max([least, *(n for n in said if type(n) is int and n < MOST)])


def _size(linear: Linear) -> tuple[int, ...]:
    return linear.dims[:2] if linear.dims else ()
