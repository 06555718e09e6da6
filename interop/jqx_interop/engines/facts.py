# SPDX-License-Identifier: Apache-2.0
"""Facts: what a checkpoint is, by its JSON files and the headers of its tensors.

A linear is whatever has codes and scales, and every matrix that is no table of embeddings; for
families that are defined here its shape comes from the configuration, for others from its codes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from jqx_interop.checkpoints import TensorInfo
from jqx_interop.inventory import EMBEDDINGS, SIBLINGS
from jqx_interop.orientation import straight_infos
from jqx_interop.targets import module_and_leaf
from jqx_interop.unfused import apart_tensors, stored_pieces

from .descriptions import Said, read_said
from .files import Files, read_files
from .known import Known, read_known
from .matching import matcher
from .reading import Group
from .schemes import FLOAT, KV_LEAVES, LEAVES, MARKS, SCHEMES, Dims, Scheme

KINDS = (
    ("experts", re.compile(r"\.experts(\.|$)")),
    ("head", re.compile(r"(^|\.)(lm_head|embed_out|output_layer|output)$")),
    ("embedding", EMBEDDINGS),
    ("attention", re.compile(r"attn|attention")),
    ("MLP", re.compile(r"mlp|feed_forward|ffn|block_sparse_moe|(^|\.)fc\d$|shared_expert")),
)
"""Kinds of layers, by the first pattern that is found in a path."""

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "w13", "w3": "w13"}
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")
STACKED = re.compile(r"\.experts\.\w+$")
NO_LINEAR = re.compile(r"norm|conv|(^|\.)(A_log|dt_bias)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """One linear. `leaves`: its tensors by leaf name; `group`: how it is said to be stored, None
    where it is left alone; `scheme`: the row for that, None where there is none; `dims`: [n, k] and
    the columns to a scale, None where they cannot be told.
    """

    path: str
    kind: str
    leaves: Mapping[str, TensorInfo]
    group: Group | None
    scheme: Scheme | None
    dims: Dims | None

    @property
    def stacked(self) -> bool:
        """Whether it is a piece of one tensor of all experts."""
        return any(info.name != f"{self.path}.{leaf}" for leaf, info in self.leaves.items())

    @property
    def quantized(self) -> bool:
        """Whether its tensors are codes."""
        weight = self.leaves.get("weight")
        return not MARKS.isdisjoint(self.leaves) or (
            weight is not None and weight.dtype not in (*FLOAT, "F64")
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """`tensors`: those of the files, but of each expert where many lie in one, which they are
    called by then; `linears` by path in natural order of the files; `fused`: module that an engine
    makes -> the linears it is made of; `rest`: tensors that belong to no linear; `known`: what the
    configuration asks for.
    """

    files: Files
    said: Said
    known: Known
    tensors: Mapping[str, TensorInfo]
    linears: Mapping[str, Linear]
    fused: Mapping[str, tuple[str, ...]]
    rest: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def layout(self) -> str:
        """The layout that descriptions say, or that of what is not described."""
        return self.said.layout

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Linear -> [n, k] as the configuration has it; empty for models not known here."""
        return self.known.linears

    @cached_property
    def siblings(self) -> tuple[tuple[Linear, ...], ...]:
        """Linears whose codes an engine puts in one matrix: those of attention, gate and up, also
        of one expert.
        """
        groups: dict[tuple[int, str], list[Linear]] = {}
        for linear in self.linears.values():
            for i, pattern in enumerate(SIBLINGS):
                if match := pattern.fullmatch(linear.path):
                    groups.setdefault((i, match["parent"] or ""), []).append(linear)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    @property
    def whole(self) -> bool:
        """Whether every file is there and sound."""
        return not self.files.damaged


def read_facts(model: str | Path) -> Facts:
    """The facts of the checkpoint `model`. Raises InputError where there is none."""
    files = read_files(model)
    said = read_said(files.config.get("quantization_config"), files.file)
    tensors = apart_tensors(files.tensors, stored_pieces(files.config, files.tensors))
    known = read_known(files.config, tensors)
    shapes = known.linears
    leaves, rest = _by_module(straight_infos(known.spec, tensors), shapes)
    ignored = matcher(said.layout, None, said.ignored)
    grouper = said.grouper()
    linears = {
        path: _linear(path, found, (said, grouper(path), ignored(path, (path,))), shapes.get(path))
        for path, found in leaves.items()
    }
    return Facts(
        files=files,
        said=said,
        known=known,
        tensors=tensors,
        linears=linears,
        fused=_fused(linears),
        rest=rest,
    )


def _by_module(
    tensors: Mapping[str, TensorInfo], shapes: Iterable[str]
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """Tensors of linears by path and leaf, in the order of the files, and those of none."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    stacked: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if STACKED.search(name) and len(info.shape) == 3:
            stacked[name] = info
        else:
            path, leaf = module_and_leaf(name)
            modules.setdefault(path, {})[leaf] = info
    known = set(shapes)
    found = {path: leaves for path, leaves in modules.items() if _is_linear(path, leaves, known)}
    found |= {name: {"weight": info} for name, info in stacked.items()}
    rest = {
        f"{path}.{leaf}" if path else leaf: info
        for path, leaves in modules.items()
        if path not in found
        for leaf, info in leaves.items()
    }
    return found, rest


def _is_linear(path: str, leaves: Mapping[str, TensorInfo], known: set[str]) -> bool:
    if path in known or not MARKS.isdisjoint(leaves):
        return True
    weight = leaves.get("weight")
    if weight is None or len(weight.shape) != 2:
        return False
    return not EMBEDDINGS.search(path) and not NO_LINEAR.search(path.rpartition(".")[2])


def _linear(
    path: str,
    leaves: Mapping[str, TensorInfo],
    told: tuple[Said, Group | None, bool | None],
    shape: tuple[int, ...] | None,
) -> Linear:
    said, group, ignored = told
    if said.layers is None and ignored:
        group = None
    scheme = SCHEMES.get((said.layout, group.scheme)) if group else None
    found = Linear(
        path=path, kind=kind_of(path), leaves=leaves, group=group, scheme=scheme, dims=None
    )
    if said.by_tensors and not found.quantized:
        group = scheme = None
    return Linear(
        path=path,
        kind=found.kind,
        leaves=leaves,
        group=group,
        scheme=scheme,
        dims=_dims(leaves, scheme, group, shape),
    )


def _dims(
    leaves: Mapping[str, TensorInfo],
    scheme: Scheme | None,
    group: Group | None,
    shape: tuple[int, ...] | None,
) -> Dims | None:
    codes = leaves.get(scheme.codes.name if scheme else "weight")
    if shape is None and (codes is None or len(codes.shape) != 2):
        return None
    if shape is None:
        assert codes is not None
        shape = scheme.matrix(codes.shape) if scheme else codes.shape
    n, k = shape[:2]
    size = (scheme.size if scheme else None) or (group.size if group else None)
    if size is None:
        size = _stored_size(leaves, k)
    return Dims(n, k, k if size == -1 else max(size, 1))


def _stored_size(leaves: Mapping[str, TensorInfo], k: int) -> int:
    """How many columns share a scale, by the shape of the scales."""
    for leaf, axis in (("weight_scale", 1), ("scales", 0)):
        info = leaves.get(leaf)
        if info is not None and len(info.shape) == 2 and info.shape[axis]:
            return -(-k // info.shape[axis])
    return max(k, 1)


def kind_of(path: str) -> str:
    """What kind of layer a module is."""
    return next((kind for kind, pattern in KINDS if pattern.search(path)), "other")


def _fused(linears: Mapping[str, Linear]) -> dict[str, tuple[str, ...]]:
    """Module -> its linears; experts of a layer are one module."""
    groups: dict[str, list[str]] = {}
    for path in linears:
        groups.setdefault(module_of(path), []).append(path)
    return {name: tuple(paths) for name, paths in groups.items()}


def module_of(path: str) -> str:
    """The module that an engine makes of a linear and those that read the same input."""
    if match := EXPERT.fullmatch(path):
        return match[1]
    parent, dot, name = path.rpartition(".")
    return f"{parent}{dot}{FUSED.get(name, name)}"


def expected_parameters(facts: Facts) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters that are not quantized and no linears; empty for
    other families.
    """
    return {
        name: shape
        for name, shape in facts.known.parameters.items()
        if name.removesuffix(".weight") not in facts.shapes and not _is_codes(facts, name)
    }


def _is_codes(facts: Facts, name: str) -> bool:
    """Whether a parameter, such as a table of embeddings, is quantized."""
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and path in facts.linears and facts.linears[path].quantized


KV_MAKERS = ("k_proj", "v_proj")
"""What scales are named by, whether or not there are such linears."""


def kv_leaves(facts: Facts) -> Iterator[tuple[str, str, TensorInfo]]:
    """Module, leaf and tensor of every scale and bias of keys and values."""
    for linear in facts.linears.values():
        for leaf in KV_LEAVES:
            if leaf in linear.leaves:
                yield linear.path.rpartition(".")[0], leaf, linear.leaves[leaf]
    for name, info in facts.rest.items():
        path, leaf = module_and_leaf(name)
        if leaf in KV_LEAVES:
            parent, _, last = path.rpartition(".")
            yield (parent if last in KV_MAKERS else path), leaf, info


def is_known_leaf(leaf: str) -> bool:
    """Whether some layout has a tensor of that name."""
    return leaf in LEAVES
