# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint consists of: its modules in order, which of them read the same input, and the
units of work.

For an architecture jqx defines, order and siblings come from its `ModelSpec`. For any other the
checkpoint itself says enough: linears are two-dimensional floating-point weights that are not
embeddings, siblings go by name.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from jqx.models import (
    ModelSpec,
    block_prefix,
    embed_tensors,
    input_groups,
    kinds,
    linear_shapes,
    param_shapes,
)
from jqx.tensors.paths import natural_key

from .checkpoints import Checkpoint

FLOATS = frozenset({"BF16", "F16", "F32"})
EMBEDDINGS = re.compile(
    r"(^|\.)(embed_tokens\w*|wte|wpe|word_embeddings?|tok_embeddings|embed_in|embed_positions"
    r"|position_embeddings|token_type_embeddings|relative_attention_bias|embeddings|shared|embed)$"
)
# Embeddings that transformers 5.14 builds from a class of its own: ModelOpt gives those no
# quantizer, so it never lists them among the modules it left alone.
SCALED_EMBEDDINGS = frozenset(
    ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text")
    + ("vaultgemma", "minicpm3", "biogpt", "xglm", "t5gemma2", "diffusion_gemma")
)
OWN_POSITIONS = re.compile(r"(^|\.)embed_positions$")
KEPT = "e_score_correction_bias"
"""The ending of tensors that are not cast to the dtype of the model, and written in float32."""

HEADS = ("lm_head.", "embed_out.", "output.", "transformer.output_layer.")
SIBLINGS = (
    # queries of attention to another sequence read something else
    re.compile(r"(?P<parent>(?!.*(cross|encoder)_?attn).*\.)?(q_proj|k_proj|v_proj)"),
    re.compile(r"(?P<parent>.*(cross|encoder)_?attn.*\.)(k_proj|v_proj)"),
    re.compile(r"(?P<parent>.*\.)?(gate_proj|up_proj)"),
    re.compile(r"(?P<parent>.*\.)?(w1|w3)"),
)
BLOCK = re.compile(r"^(.+?\.\d+)\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """A linear or an embedding: its path, kind, and the shape and stored dtype of its weight."""

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def weight(self) -> str:
        """The name of its weight in the checkpoint."""
        return self.path + ".weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """Everything that will be written, in module order.

    `tensors`: names; `modules`: those that could be quantized; `siblings`: groups of linears with
    one input; `units`: the tensors that are finished together, a decoder block or what lies
    outside; `blocks`: the index in `units` of every decoder block; `absent`: modules that own no
    tensor, such as a tied head; `carried`: tensors of other models, which
    stay as they are, and `others` their linears.
    """

    tensors: tuple[str, ...]
    modules: tuple[Module, ...]
    siblings: tuple[tuple[str, ...], ...]
    units: tuple[tuple[str, ...], ...]
    blocks: tuple[int, ...]
    absent: tuple[str, ...] = ()
    carried: frozenset[str] = frozenset()
    others: tuple[str, ...] = ()


def take_inventory(checkpoint: Checkpoint, spec: ModelSpec | None) -> Inventory:
    """The inventory of `checkpoint`, by `spec` where the architecture is known, else by names and
    ranks.
    """
    names = _known_order(checkpoint, spec) if spec else _by_name(checkpoint)
    carried = carried_tensors(checkpoint, spec) if spec else []
    units = _units(names)
    blocks = _place_blocks(spec, units) if spec else []
    modules = tuple(_modules(checkpoint, names, spec))
    units += _units(carried)
    paths = [module.path for module in modules if module.kind == "linear"]
    return Inventory(
        tensors=(*names, *carried),
        modules=modules,
        siblings=_siblings(paths) if spec is None else _spec_siblings(spec, paths),
        units=tuple(units),
        blocks=tuple(blocks),
        absent=_absent_head(checkpoint, spec, names),
        carried=frozenset(carried),
        others=tuple(matrices(checkpoint, carried)),
    )


def carried_tensors(checkpoint: Checkpoint, spec: ModelSpec) -> list[str]:
    """Tensors of other models in the same files, in natural order."""
    globs = spec.names.carried
    found = [n for n in checkpoint.tensors if any(fnmatchcase(n, glob) for glob in globs)]
    return sorted(found, key=natural_key)


def _known_order(checkpoint: Checkpoint, spec: ModelSpec) -> list[str]:
    return [name for name in param_shapes(spec) if name in checkpoint.tensors]


def _by_name(checkpoint: Checkpoint) -> list[str]:
    """Every tensor in natural order, without the copy of the embedding some tied models ship."""
    names = sorted(checkpoint.tensors, key=natural_key)
    head = "lm_head.weight"
    if checkpoint.config.get("tie_word_embeddings") and head in names:
        tables = [n for n in names if EMBEDDINGS.search(n.removesuffix(".weight"))]
        if any(same_tensor(checkpoint, head, table) for table in tables):
            names.remove(head)
    return names


def same_tensor(checkpoint: Checkpoint, a: str, b: str) -> bool:
    """Whether two tensors hold the same bytes. Reads them."""
    first, second = checkpoint.tensors[a], checkpoint.tensors[b]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    same = np.array_equal(checkpoint.read(a).view(np.uint8), checkpoint.read(b).view(np.uint8))
    checkpoint.release(a)
    checkpoint.release(b)
    return same


def matrices(checkpoint: Checkpoint, names: list[str]) -> Iterable[str]:
    """The modules whose weights are matrices."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and len(checkpoint.tensors[name].shape) == 2:
            yield path


def _absent_head(
    checkpoint: Checkpoint, spec: ModelSpec | None, names: list[str]
) -> tuple[str, ...]:
    """A tied head owns no tensor, and is still a module that was left alone."""
    if spec is not None:
        head = spec.names.head
    elif checkpoint.config.get("tie_word_embeddings", True) and _generates(checkpoint, names):
        head = "lm_head"
    else:
        return ()
    return () if head + ".weight" in names else (head,)


def _generates(checkpoint: Checkpoint, names: list[str]) -> bool:
    """Whether the model has a head at all, and none under a name of its own."""
    owned = any(name.startswith(HEADS) for name in names)
    classes = checkpoint.config.get("architectures") or []
    return not owned and any("CausalLM" in name or "LMHead" in name for name in classes)


def _place_blocks(spec: ModelSpec, units: list[tuple[str, ...]]) -> list[int]:
    """The index in `units` of every block; one that owns no tensor gets a unit without any."""
    at = {_block_of(unit[0]): i for i, unit in enumerate(units)}
    blocks: list[int] = []
    added = 0
    for i in range(len(kinds(spec))):
        found = at.get(block_prefix(spec, i))
        if found is None:
            last = blocks[-1] if blocks else len(embed_tensors(spec)) - 1
            units.insert(last + 1, ())
            blocks.append(last + 1)
            added += 1
        else:
            blocks.append(found + added)
    return blocks


def _modules(
    checkpoint: Checkpoint, names: Iterable[str], spec: ModelSpec | None
) -> Iterable[Module]:
    known = linear_shapes(spec) if spec else {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        info = checkpoint.tensors[name]
        if path in known and leaf == "weight":
            if info.dtype in FLOATS:
                yield Module(path=path, kind="linear", shape=known[path], dtype=info.dtype)
        elif leaf == "weight" and len(info.shape) == 2 and info.dtype in FLOATS:
            if EMBEDDINGS.search(path) or (spec is not None and path in projections(spec)):
                own = checkpoint.config.get("model_type") in SCALED_EMBEDDINGS
                if own or OWN_POSITIONS.search(path):
                    continue
                kind = "embedding"
            elif spec is not None:  # a norm of each head
                continue
            else:
                kind = "linear"
            yield Module(path=path, kind=kind, shape=tuple(info.shape), dtype=info.dtype)


def projections(spec: ModelSpec) -> tuple[str, ...]:
    """What changes the width of embeddings, which is not calibrated."""
    return () if spec.embed_width is None else (spec.names.project_in, spec.names.project_out)


def _siblings(paths: list[str]) -> tuple[tuple[str, ...], ...]:
    groups: dict[tuple[int, str], list[str]] = {}
    for path in paths:
        for i, pattern in enumerate(SIBLINGS):
            if match := pattern.fullmatch(path):
                groups.setdefault((i, match["parent"] or ""), []).append(path)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _spec_siblings(spec: ModelSpec, paths: list[str]) -> tuple[tuple[str, ...], ...]:
    present = set(paths)
    groups = []
    for i, kind in enumerate(kinds(spec)):
        for group in input_groups(spec, kind):
            members = tuple(f"{block_prefix(spec, i)}.{name}" for name in group)
            members = tuple(member for member in members if member in present)
            if len(members) > 1:
                groups.append(members)
    return tuple(groups)


def _block_of(name: str) -> str | None:
    match = BLOCK.match(name)
    return match[1] if match else None


def _units(names: list[str]) -> list[tuple[str, ...]]:
    units: list[list[str]] = []
    last: str | None = None
    for name in names:
        block = _block_of(name)
        if units and block is not None and block == last:
            units[-1].append(name)
        else:
            units.append([name])
        last = block
    return [tuple(unit) for unit in units]
