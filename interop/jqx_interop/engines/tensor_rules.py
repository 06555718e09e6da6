# SPDX-License-Identifier: Apache-2.0
"""TENSOR_RULES: names, dtypes and shapes of tensors against what the descriptions promise."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import translate

from jqx_interop.checkpoints import TensorInfo

from .facts import Facts, Linear, expected_parameters, is_known_leaf, kind_of
from .matching import any_of
from .schemes import FLOAT, GPTQ, KV_LEAVES, MODELOPT, Dims, Leaf


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRule:
    """One comparison of headers with what they should be; `spares`: engines that do without;
    `given`: whether a source may have it.
    """

    name: str
    check: Callable[[Facts], Iterable[str]]
    source: str
    spares: frozenset[str] = frozenset()
    given: bool = False


def _stored(facts: Facts) -> Iterator[Linear]:
    """Linears that are described as quantized, and are."""
    for linear in facts.linears.values():
        if linear.group is not None and linear.scheme is not None and linear.quantized:
            yield linear


def _missing(facts: Facts) -> Iterator[str]:
    if not facts.whole:
        return
    for linear in _stored(facts):
        for leaf in linear.scheme.leaves if linear.scheme else ():
            if leaf.needed and leaf.name not in linear.leaves and not _of_inputs(facts, leaf):
                yield f"{linear.path}.{leaf.name} is missing"
    yield from _absent(facts)


def _absent(facts: Facts) -> Iterator[str]:
    expected = expected_parameters(facts)
    have = facts.tensors
    yield from (f"{name} is missing" for name in expected if name not in have)
    for path in facts.shapes:
        if path not in facts.linears:
            yield f"{path}.weight is missing, and so are codes of {path}"


def _of_inputs(facts: Facts, leaf: Leaf) -> bool:
    return facts.layout == MODELOPT and leaf.name == "input_scale"


def _missing_inputs(facts: Facts) -> Iterator[str]:
    if not facts.whole:
        return
    for linear in _stored(facts):
        for leaf in linear.scheme.leaves if linear.scheme else ():
            if leaf.needed and leaf.name not in linear.leaves and _of_inputs(facts, leaf):
                yield f"{linear.path}.{leaf.name} is missing"


def _with_leaf(facts: Facts) -> Iterator[tuple[Linear, Leaf, TensorInfo]]:
    for linear in _stored(facts):
        for leaf in linear.scheme.leaves if linear.scheme else ():
            if leaf.name in linear.leaves:
                yield linear, leaf, linear.leaves[leaf.name]


def _dtypes(facts: Facts) -> Iterator[str]:
    for _, leaf, info in _with_leaf(facts):
        if info.dtype not in leaf.dtypes:
            yield f"{info.name} is {info.dtype}, and should be {' or '.join(leaf.dtypes)}"
    expected = expected_parameters(facts)
    for name in expected:
        info = facts.tensors.get(name)
        if info is not None and info.dtype not in FLOAT:
            yield f"{name} is {info.dtype}, and should be {' or '.join(FLOAT)}"


def _shapes(facts: Facts) -> Iterator[str]:
    for linear, leaf, info in _with_leaf(facts):
        if linear.dims is None or _fits(leaf, linear.dims, info):
            continue
        if _other_size(linear, leaf, linear.dims) is None:
            wanted = " or ".join(str(list(s)) for s in leaf.shapes(linear.dims))
            yield f"{info.name} has shape {list(info.shape)}, and should have {wanted}"
    yield from _sized(facts)


def _sized(facts: Facts) -> Iterator[str]:
    for name, shape in (*expected_parameters(facts).items(), *_plain(facts)):
        info = facts.tensors.get(name)
        if info is not None and info.shape != shape:
            yield f"{name} has shape {list(info.shape)}, config.json asks for {list(shape)}"


def _plain(facts: Facts) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path, shape in facts.shapes.items():
        linear = facts.linears.get(path)
        if linear is not None and not linear.quantized:
            yield f"{path}.weight", shape


def _fits(leaf: Leaf, dims: Dims, info: TensorInfo) -> bool:
    shapes = leaf.shapes(dims)
    one = math.prod(info.shape) == 1 and any(math.prod(shape) == 1 for shape in shapes)
    return not shapes or one or info.shape in shapes


def _other_size(linear: Linear, leaf: Leaf, dims: Dims) -> int | None:
    """How many columns share a scale, where that is another number than is said."""
    info, axis = linear.leaves[leaf.name], 0 if leaf.name == "scales" else 1
    if leaf.name not in ("weight_scale", "scales") or len(info.shape) != 2:
        return None
    blocks, rows = info.shape[axis], info.shape[1 - axis]
    if not blocks or rows != dims.n or dims.k % blocks or leaf.shapes(dims) == ((1,),):
        return None
    size = dims.k // blocks
    return size if size != dims.g and linear.group and linear.group.size else None


def _sizes(facts: Facts) -> Iterator[str]:
    for linear, leaf, info in _with_leaf(facts):
        if linear.dims is None or _fits(leaf, linear.dims, info):
            continue
        if (size := _other_size(linear, leaf, linear.dims)) is not None:
            said = linear.group.size if linear.group else None
            told = "one for whole rows" if said == -1 else said
            yield f"{info.name} has a scale for {size} columns, the descriptions say {told}"


def _unknown(facts: Facts) -> Iterator[str]:
    for linear in facts.linears.values():
        for leaf, info in linear.leaves.items():
            if not _known(linear, leaf):
                yield f"{info.name} is no tensor of {_told(linear)}"
    if facts.shapes and facts.said.understood:
        yield from _beside(facts)


def _beside(facts: Facts) -> Iterator[str]:
    """Tensors of no parameter of a model that is known."""
    known, optional = facts.known.parameters, facts.known.optional
    names = any_of(map(translate, optional))
    for name in facts.rest:
        leaf = name.rpartition(".")[2]
        if name in known or names.match(name):
            continue
        if not (leaf in KV_LEAVES and kind_of(name) == "attention"):
            yield f"{name} is no tensor of the model"
    for path, linear in facts.linears.items():
        if f"{path}.weight" not in known and not names.match(f"{path}.weight"):
            told = ", ".join(info.name for info in linear.leaves.values())
            yield f"{told}: the model has no {path}"
            continue
        bias = linear.leaves.get("bias")
        own = f"{path}.bias"
        if bias is not None and own not in known and not names.match(own):
            yield from (f"{bias.name} is no tensor of the model",) if _counts(facts, bias) else ()


def _counts(facts: Facts, bias: TensorInfo) -> bool:
    """Whether a bias is not the zeros that GPTQ's packages write, which engines drop."""
    if facts.layout != GPTQ or bias.file.name in facts.files.damaged:
        return facts.layout != GPTQ
    found = bool(facts.files.mapped.read(bias.name).any())
    facts.files.mapped.release(bias.name)
    return found


def _known(linear: Linear, leaf: str) -> bool:
    if leaf in ("weight", "bias", *KV_LEAVES) or not linear.quantized:
        return leaf != "weight" or not _elsewhere(linear)
    if linear.scheme is None:
        return is_known_leaf(leaf)
    return leaf in {known.name for known in linear.scheme.leaves}


def _elsewhere(linear: Linear) -> bool:
    """Whether the codes lie under another name than `weight`."""
    return linear.quantized and linear.scheme is not None and linear.scheme.codes.name != "weight"


def _told(linear: Linear) -> str:
    return f"a linear in {linear.group.scheme}" if linear.group else "a plain linear"


LAYOUT = "what ModelOpt 0.47, compressed-tensors 0.20, AutoAWQ and GPTQ write"
TENSOR_RULES = (
    TensorRule(name="missing-tensor", check=_missing, source=LAYOUT),
    TensorRule(
        name="input-scale",
        check=_missing_inputs,
        source=f"{LAYOUT}; TensorRT-LLM quantizes inputs dynamically without (read, not run)",
        spares=frozenset(("trtllm",)),
    ),
    TensorRule(name="dtype", check=_dtypes, source=LAYOUT),
    TensorRule(name="shape", check=_shapes, source=LAYOUT),
    TensorRule(name="group-size", check=_sizes, source="group_size of the descriptions"),
    TensorRule(name="unknown-tensor", check=_unknown, source=LAYOUT),
)
