# SPDX-License-Identifier: Apache-2.0
"""LOADING: what an engine does with tensors and files, where it knows the formats."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .description_checks import ROUTERS
from .engines import Engine
from .experts import STACKED
from .facts import Facts, Linear
from .intrinsic import Seen
from .loading_keys import KEY_RULES
from .matching import matcher
from .problem import ERROR, WARNING, first
from .rule import Finding, Rule
from .schemes import AWQ, CT, MODELOPT


@dataclass(frozen=True, slots=True)
class Unequal:
    """What an engine does where linears of one matrix have scales that differ."""

    severity: str
    does: str
    source: str


_MODELOPT = "vLLM 0.32 layers/quantization/modelopt.py process"
_SGLANG = "SGLang 0.5.23 srt/layers/quantization/modelopt_quant.py"
_TRTLLM = "TensorRT-LLM _torch/modules/linear.py (read, not run)"
_CT = "vLLM 0.32 compressed_tensors/schemes/compressed_tensors_w4a4_nvfp4.py"
_TPU = "tpu-inference 0.32 layers/vllm/quantization/nvfp4.py"
_REQUANTIZED = "weights are rounded again with the largest, so another model is served"
_LARGEST = "the largest is used for all, so inputs are rounded more coarsely"
_WRONG = "one is used for all, so blocks of the others decode wrongly"

UNEQUAL: Mapping[tuple[str, str], Mapping[str, Unequal]] = {
    ("FP8", "weight_scale"): {
        "vllm": Unequal(WARNING, _REQUANTIZED, _MODELOPT),
        "sglang": Unequal(WARNING, _REQUANTIZED, _SGLANG),
        "trtllm": Unequal(WARNING, _REQUANTIZED, _TRTLLM),
    },
    ("FP8", "input_scale"): {
        "vllm": Unequal(WARNING, _LARGEST, _MODELOPT),
        "sglang": Unequal(WARNING, _LARGEST, _SGLANG),
        "trtllm": Unequal(WARNING, _LARGEST, _TRTLLM),
    },
    ("FP4", "weight_scale_2"): {
        "vllm": Unequal(ERROR, _WRONG, _MODELOPT),
        "sglang": Unequal(ERROR, _WRONG, _SGLANG),
        "trtllm": Unequal(ERROR, "it asserts that they are equal", _TRTLLM),
        "tpu-vllm": Unequal(ERROR, _WRONG, _TPU),
    },
    ("FP4", "input_scale"): {
        "vllm": Unequal(WARNING, _LARGEST, _MODELOPT),
        "sglang": Unequal(WARNING, _LARGEST, _SGLANG),
        "trtllm": Unequal(ERROR, "it asserts that they are equal", _TRTLLM),
    },
    ("FP4", "weight_global_scale"): {
        "vllm": Unequal(ERROR, _WRONG, _CT),
        "sglang": Unequal(ERROR, _WRONG, "SGLang 0.5.23 compressed_tensors_w4a4_nvfp4.py"),
        "tpu-vllm": Unequal(ERROR, _WRONG, _TPU),
    },
    ("FP4", "input_global_scale"): {
        "vllm": Unequal(WARNING, "the largest is used for all, so inputs may saturate", _CT),
        "sglang": Unequal(WARNING, "one is used for all", "SGLang 0.5.23 the same file"),
    },
    ("INT8", "input_scale"): {
        "vllm": Unequal(WARNING, _LARGEST, "vLLM 0.32 compressed_tensors_w8a8_int8.py"),
        "sglang": Unequal(WARNING, _LARGEST, "SGLang 0.5.23 compressed_tensors_w8a8_int8.py"),
    },
    ("W4A8_AWQ", "weight_scale_2"): {
        "trtllm": Unequal(ERROR, "it asserts that they are equal", _TRTLLM),
    },
    ("W4A8_AWQ", "input_scale"): {
        "trtllm": Unequal(ERROR, "it asserts that they are equal", _TRTLLM),
    },
}
"""(family of schemes, leaf) -> engine -> what it does."""

FP4 = ("NVFP4", "NVFP4_AWQ", "NVFP4_SVD", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "NVFP4A16")
FAMILY: Mapping[str, str] = dict.fromkeys(FP4, "FP4")


def _unequal(seen: Seen, engine: Engine) -> Iterator[Finding]:
    """Scales of one number that differ within a fused matrix."""
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for group in seen.facts.siblings:
        schemes = {linear.scheme.name for linear in group if linear.scheme}
        scheme = schemes.pop() if len(schemes) == 1 else ""
        for leaf in ("weight_scale", "weight_scale_2", "input_scale", *_GLOBAL):
            key = (FAMILY.get(scheme, scheme), leaf)
            values = _values(seen, group, leaf) if engine.name in UNEQUAL.get(key, {}) else {}
            if len(set(values.values())) > 1:
                found[key].append(values)
    for key, groups in found.items():
        row = UNEQUAL[key][engine.name]
        worst = max(groups, key=lambda g: max(g.values()) / max(min(g.values()), 1e-38))
        told = ", ".join(f"{name} {value:.4g}" for name, value in worst.items())
        more = f" (of {len(groups)} such matrices those differ most)" if len(groups) > 1 else ""
        text = f"{told} differ{more}: {row.does}"
        yield Finding(text=text, severity=row.severity, source=row.source)


_GLOBAL = ("weight_global_scale", "input_global_scale")


def _values(seen: Seen, group: tuple[Linear, ...], leaf: str) -> dict[str, float]:
    """The names and values of a leaf that is one number."""
    names = (linear.leaves[leaf].name for linear in group if leaf in linear.leaves)
    single = seen.numbers.single
    return {name: single[name] for name in names if name in single}


def _mixed(seen: Seen, engine: Engine) -> Iterator[str]:
    """Linears of one matrix that are not stored alike."""
    for group in seen.facts.siblings if engine.fuses else ():
        kinds = {x.group.scheme if x.group and x.quantized else "unquantized" for x in group}
        if len(kinds) > 1:
            yield (
                f"{first(linear.path for linear in group)}: {' and '.join(sorted(kinds))} in what "
                f"{engine.label} makes one matrix"
            )


def _ignored(seen: Seen, engine: Engine) -> Iterator[str]:
    """Modules that the engine leaves alone though they are quantized, or the other way round."""
    facts = seen.facts
    if facts.layout not in (MODELOPT, CT, AWQ) or not facts.said.ignored:
        return
    theirs = matcher(facts.layout, engine.name, facts.said.ignored)
    own = matcher(facts.layout, None, facts.said.ignored)
    for module, paths in facts.fused.items():
        found = facts.linears[paths[0]]
        if facts.said.layers is None and found.group is None and not own(module, paths):
            continue  # no group means it, or there is no list
        linears = paths if found.kind != "experts" else ()
        for name, names in [(module, linears)] if engine.fuses else [(p, (p,)) for p in paths]:
            yield from _disagreement(facts, engine, (name, paths), theirs(name, names))


NO_LIST = ("vllm",)
"""Engines that go by the tensors of an AWQ checkpoint without a list (vLLM 0.32 auto_awq.py
maybe_update_config)."""


def _no_list(seen: Seen, engine: Engine) -> Iterator[Finding]:
    """Linears that are not quantized though no list of AWQ says so."""
    facts = seen.facts
    if facts.layout != AWQ or not facts.said.by_tensors or engine.name in NO_LIST:
        return
    means = matcher(AWQ, None, facts.said.ignored)
    plain = [p for p, x in facts.linears.items() if not x.quantized and not means(p, (p,))]
    plain = [path for path in plain if path.rpartition(".")[2] not in ROUTERS]
    if plain:
        text = f"{first(plain)}: not quantized, and modules_to_not_convert names nothing"
        yield Finding(text=text, loads=None)


def _disagreement(
    facts: Facts, engine: Engine, module: tuple[str, tuple[str, ...]], ignored: bool | None
) -> Iterator[str]:
    name, paths = module
    quantized = {facts.linears[path].quantized for path in paths}
    if ignored is None:
        yield f"{name}: {engine.label} finds some of {first(paths)} ignored and others not"
    elif ignored and True in quantized and facts.linears[paths[0]].group is not None:
        yield f"{name} is quantized, and {engine.label} reads the list so that it is left alone"
    elif not ignored and quantized == {False} and facts.linears[paths[0]].group is None:
        yield f"{name} is not quantized, and {engine.label} finds no entry of the list that says so"


def _tied_head(seen: Seen, engine: Engine) -> Iterator[str]:
    facts = seen.facts
    layers = facts.said.layers is not None or facts.layout != MODELOPT
    tied = facts.files.config.get("tie_word_embeddings") is True
    if engine.name != "vllm" or layers or not tied or "lm_head" in facts.linears:
        return
    if facts.said.groups and not matcher(MODELOPT, "vllm", facts.said.ignored)("lm_head", ()):
        yield "lm_head is the tied table of embeddings and is not listed among what is left alone"


MULTIPLES = {"FP8_PB_WO": 128, "NVFP4": 16, "W4A16_NVFP4": 16, "MXFP8": 32}
"""Algorithm of ModelOpt -> what the number of columns must be a multiple of."""


def _columns(seen: Seen, engine: Engine) -> Iterator[str]:
    if seen.facts.layout != MODELOPT or engine.name not in ("vllm", "tpu-vllm"):
        return
    for linear in seen.facts.linears.values():
        step = MULTIPLES.get(linear.scheme.name, 1) if linear.scheme else 1
        if linear.dims is not None and linear.quantized and linear.dims.k % step:
            yield f"{linear.path} has {linear.dims.k} columns, no multiple of {step}"


def _stacked_experts(seen: Seen, engine: Engine) -> Iterator[Finding]:
    """Experts that are quantized and lie in one tensor, where that is not known to be read."""
    kind = str(seen.facts.files.config.get("model_type"))
    stacks: dict[str, dict[str, None]] = {}
    for linear in seen.facts.linears.values():
        if linear.kind == "experts" and linear.quantized and (linear.stacked or _rank(linear) == 3):
            scheme = linear.scheme.name if linear.scheme else ""
            stacks.setdefault(scheme, {})[linear.leaves["weight"].name] = None
    for scheme, names in stacks.items():
        row = STACKED.get((engine.name, kind, scheme))
        if row is None:
            text = f"{first(names)}: how {engine.label} reads experts in one tensor was not found"
            yield Finding(text=f"{text} out", loads=None)
        elif not row.loads:
            text = f"{first(names)}: {row.note}"
            yield Finding(text=text, source=row.source, loads=row.loads)


def _rank(linear: Linear) -> int:
    return max(len(info.shape) for info in linear.leaves.values())


LOADING: tuple[Rule[Seen], ...] = (
    Rule(
        name="fused-scales",
        check=_unequal,
        source=_MODELOPT,
        way_out="quantize with scales that linears of one input share",
    ),
    Rule(
        name="fused-formats",
        check=_mixed,
        source="vLLM 0.32 and SGLang 0.5.23 raise; TensorRT-LLM takes the entry of q_proj (read)",
        way_out="give linears that read the same input the same format",
    ),
    Rule(
        name="ignored",
        check=_ignored,
        source="engines/matching.py, from each engine's own",
        way_out="list the linears by their full names",
    ),
    Rule(
        name="no-list",
        check=_no_list,
        source="vLLM 0.32 auto_awq.py fills the list from the tensors; of others it was not read",
        way_out="name what is not quantized in modules_to_not_convert",
    ),
    Rule(
        name="tied-head",
        check=_tied_head,
        source="vLLM 0.32 layers/quantization/modelopt.py: a head has scales unless it is listed",
        way_out="list lm_head among what is left alone",
    ),
    Rule(
        name="columns",
        check=_columns,
        source="vLLM 0.32 layers/quantization/modelopt.py create_weights",
        way_out="leave such linears as they are, or choose another format",
    ),
    *KEY_RULES,
    Rule(
        name="stacked-experts",
        check=_stacked_experts,
        source="no rule here",
        way_out="jqx quantize --no-fuse-experts writes tensors of each expert",
    ),
)
