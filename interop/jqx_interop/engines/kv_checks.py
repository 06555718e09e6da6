# SPDX-License-Identifier: Apache-2.0
"""Scales of keys and values: that both are there, in every layer, where engines look for them."""

import math
from collections.abc import Iterator

from jqx_interop.inventory import BLOCK

from .facts import Facts, kv_leaves
from .problem import first


def pairs(facts: Facts) -> Iterator[str]:
    """Those of keys without those of values, and the other way round."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for module, leaf, info in kv_leaves(facts):
        found.setdefault((module, leaf[2:]), {})[leaf[0]] = info.name
    for (_, leaf), pair in found.items():
        for letter, other in (("k", "v"), ("v", "k")):
            if letter in pair and other not in pair:
                yield f"{pair[letter]} is there, and no {other}_{leaf} beside it"


def described(facts: Facts) -> Iterator[str]:
    """Those that no description mentions."""
    names = [info.name for _, _, info in kv_leaves(facts)]
    if names and facts.said.kv is None:
        yield f"{first(names)}: scales of keys and values that no description mentions"


def places(facts: Facts) -> Iterator[str]:
    """Those of a module that is neither attention nor the linear of keys or values."""
    for _, leaf, info in kv_leaves(facts):
        module = info.name.rpartition(".")[0].rpartition(".")[2]
        if module not in (f"{leaf[0]}_proj", "qkv_proj") and "att" not in module:
            yield f"{info.name}: engines look for it on {leaf[0]}_proj or on attention itself"


def shapes(facts: Facts) -> Iterator[str]:
    """Scales of more than one number, unless each head is said to have its own."""
    config = facts.files.config.get("quantization_config")
    scheme = config.get("kv_cache_scheme") if isinstance(config, dict) else None
    if isinstance(scheme, dict) and scheme.get("strategy") == "attn_head":
        return
    for _, leaf, info in kv_leaves(facts):
        if leaf.endswith("_scale") and math.prod(info.shape) != 1:
            yield f"{info.name} has shape {list(info.shape)}, and should be one number"


def layers(facts: Facts) -> Iterator[str]:
    """Layers without a scale of keys, where others have one."""
    every = {match[1] for p in facts.linears if p.endswith(".k_proj") and (match := BLOCK.match(p))}
    named = (info.name for _, leaf, info in kv_leaves(facts) if leaf == "k_scale")
    have = {match[1] for name in named if (match := BLOCK.match(name))}
    if have and every - have:
        yield f"k_scale is in {len(have & every)} of {len(every)} layers"
