# SPDX-License-Identifier: Apache-2.0
"""FORMAT_RULES: whether an engine knows the formats, told without a look at tensors."""

from collections.abc import Iterator

from .accepts import find_accept
from .engines import Engine
from .experts import EXPERTS
from .formats import Formats, is_fused, mixed_name
from .problem import WARNING, first
from .rule import Finding, Rule
from .schemes import CT, MODELOPT, PLAIN

OTHER_LAYOUT = "write another layout (--target compressed-tensors) or choose another format"


def _accepted(formats: Formats, engine: Engine) -> Iterator[Finding]:
    """Schemes that have no row which says yes."""
    names = [use.scheme for use in formats.uses] or [PLAIN]
    if (mixed := mixed_name(formats)) is not None:
        names.insert(0, mixed)
    layout = formats.layout if formats.uses else PLAIN
    for name in dict.fromkeys(names):
        row = find_accept(engine.name, layout, name)
        if row.loads is not True:
            says = "is not read" if row.loads is False else "may not be read"
            text = f"{name} in the layout {layout} {says}: {row.note}"
            yield Finding(text=text, source=row.source, loads=row.loads)
        elif row.differs:
            text = f"{name}: {row.note}"
            yield Finding(text=text, source=row.source, severity=WARNING)


def _unknown_layout(formats: Formats, engine: Engine) -> Iterator[Finding]:
    """A checkpoint that is described as something this module has no scheme for."""
    if not formats.uses and formats.layout not in (PLAIN, MODELOPT, CT):
        text = f"its quant_method is {formats.layout}, of which nothing was read"
        yield Finding(text=text, loads=None)


def _size(formats: Formats, engine: Engine) -> Iterator[str]:
    for use in formats.uses:
        row = find_accept(engine.name, formats.layout, use.scheme)
        if row.loads and row.size is not None and use.size not in (None, row.size):
            yield (
                f"{use.scheme} with {use.size} columns to a scale ({first(use.paths)}): "
                f"{engine.label} takes {row.size} alone"
            )


def _extra(formats: Formats, engine: Engine) -> Iterator[Finding]:
    """Leaves that the engine has no place for."""
    for use in formats.uses:
        row = find_accept(engine.name, formats.layout, use.scheme)
        for leaf, paths in use.extra.items() if row.loads and engine.unknown else ():
            if leaf not in row.takes and leaf not in ("g_idx", "weight_g_idx"):
                tensors = first(f"{path}.{leaf}" for path in paths)
                yield Finding(text=f"{tensors}: {engine.unknown}", source=engine.source)
    if formats.biases:
        text = f"k_bias and v_bias of keys and values: {engine.unknown}"
        yield Finding(text=text, source=engine.source)


def _needed(formats: Formats, engine: Engine) -> Iterator[str]:
    """Leaves without which the engine does not do, and that it ignores where linears are fused."""
    for use in formats.uses:
        row = find_accept(engine.name, formats.layout, use.scheme)
        for leaf in row.needs if row.loads else ():
            have = set(use.extra.get(leaf, ()))
            without = [p for p in use.paths if not is_fused(p) and p not in have]
            if without:
                yield f"{first(f'{p}.{leaf}' for p in without)}: {engine.label} asks for it"
            ignored = [p for p in use.paths if is_fused(p) and p in have]
            if ignored:
                yield f"{first(f'{p}.{leaf}' for p in ignored)}: {engine.label} ignores it there"


def _mixed(formats: Formats, engine: Engine) -> Iterator[str]:
    """SGLang takes a mixture without NVFP4 for another method."""
    names = {use.scheme for use in formats.uses}
    if formats.layout == MODELOPT and formats.mixed and engine.name == "sglang":
        if names and names.isdisjoint(("NVFP4", "W4A16_NVFP4")):
            yield f"a mixture of {', '.join(sorted(names))}: SGLang parses it as w4afp8"
        if "NVFP4_AWQ" in names:
            yield "a mixture with NVFP4_AWQ: SGLang leaves such linears unquantized"


def _experts(formats: Formats, engine: Engine) -> Iterator[Finding]:
    """Schemes that experts cannot have there."""
    for use in formats.uses:
        differs = EXPERTS.get((engine.name, formats.layout, use.scheme))
        paths = [path for path in use.paths if ".experts" in path]
        if differs is not None and paths:
            text = f"{use.scheme} in experts ({first(paths, 1)}): {differs.note}"
            yield Finding(text=text, source=differs.source, loads=differs.loads)


KV_TAKEN = {
    "vllm": ("FP8", "NVFP4"),
    "sglang": ("FP8", "NVFP4"),
    "trtllm": ("FP8", "INT8", "NVFP4"),
    "tpu-vllm": ("FP8",),
    "transformers": ("FP8",),
}
"""Engine -> what keys and values may be called."""


def _kv(formats: Formats, engine: Engine) -> Iterator[Finding]:
    taken = KV_TAKEN[engine.name]
    if formats.kv is None or formats.kv in taken:
        return
    text = f"keys and values in {formats.kv}: {engine.label} knows {', '.join(taken)}"
    tpu = engine.name == "tpu-vllm" and formats.kv == "NVFP4"  # it warns and leaves them alone
    yield Finding(text=text, severity=WARNING if tpu else None)


FORMAT_RULES = (
    Rule(
        name="accepts",
        check=_accepted,
        source="engines/accepts.py",
        way_out=OTHER_LAYOUT,
    ),
    Rule(
        name="layout",
        check=_unknown_layout,
        source="no rule here",
        way_out="ask the engine's own documentation",
    ),
    Rule(
        name="experts-format",
        check=_experts,
        source="engines/experts.py",
        way_out="quantize experts to FP8 with one scale, or to NVFP4, or write another layout",
    ),
    Rule(
        name="block-size",
        check=_size,
        source="vLLM 0.32 and SGLang 0.5.23 modelopt code, TensorRT-LLM linear.py (read)",
        way_out="quantize with blocks of 16 (--set block=16)",
    ),
    Rule(
        name="unread-tensor",
        check=_extra,
        source="the engine's loader",
        way_out="choose a recipe that leaves nothing beside codes and scales",
    ),
    Rule(
        name="needed-tensor",
        check=_needed,
        source="TensorRT-LLM _torch/modules/linear.py (read, not run)",
        way_out="quantize with AWQ (--qformat int4_awq), or write compressed-tensors for vLLM",
    ),
    Rule(
        name="mixture",
        check=_mixed,
        source="SGLang 0.5.23 srt/configs/model_config.py _parse_modelopt_quant_config",
        way_out="keep at least one linear in NVFP4",
    ),
    Rule(
        name="kv-cache",
        check=_kv,
        source="each engine's reading of kv_cache_scheme and kv_cache_quant_algo",
        way_out="quantize keys and values with --kv-cache fp8, or leave them alone",
    ),
)
