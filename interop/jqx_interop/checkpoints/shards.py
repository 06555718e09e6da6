# SPDX-License-Identifier: Apache-2.0
"""Which tensor goes into which file, at which byte: decided from names, dtypes and shapes alone.

The split and the index are those of huggingface_hub and transformers 5.14; the layout inside a
file is that of the safetensors serializer, so equal tensors give equal files.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jqx.errors import InputError

from .layout import DTYPES, encode_header, nbytes
from .problems import one_line
from .read import SINGLE

RANK = {name: rank for rank, name in enumerate(DTYPES)}
UNITS = {
    **{"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40},
}

# Last name components of what a torch model holds as buffers: the index's total_parameters
# leaves them out.
BUFFERS = frozenset(
    ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "k_scale", "v_scale")
    + ("k_bias", "v_bias", "_svdquant_lora_a", "_svdquant_lora_b", "e_score_correction_bias")
)


@dataclass(frozen=True, slots=True)
class TensorOut:
    """A tensor to be written; `dtype` is the format's name, such as "F8_E4M3"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One file: its tensors in the order they lie in it, and where each begins."""

    file: str
    tensors: tuple[TensorOut, ...]
    header: bytes  # length field, JSON and padding
    starts: tuple[int, ...]  # first byte of each tensor, counted from the first of the file
    size: int  # bytes of the whole file


def parse_size(text: str | int) -> int:
    """Bytes meant by "10GB" (10 * 1000**3), "4GiB" (4 * 1024**3), "0.5GB" or a plain number.

    InputError for anything else, and for sizes below one byte.
    """
    word = str(text).strip()
    unit = next((u for u in sorted(UNITS, key=len, reverse=True) if word.upper().endswith(u)), "")
    try:
        size = float(word[: len(word) - len(unit)]) * UNITS.get(unit, 1)
        if not 1 <= size < math.inf:
            raise ValueError
    except ValueError:
        message = f"{text!r} is not a size. Write it as 500MB, 10GB or 4GiB."
        raise InputError(one_line(message)) from None
    return int(size)


def plan_shards(
    tensors: Iterable[TensorOut],
    max_shard_size: str | int = "10GB",
    notes: Mapping[str, str] | None = None,
) -> tuple[ShardPlan, ...]:
    """Distribute tensors, given in module order, over files of at most `max_shard_size`. `notes`
    are metadata of the first file.

    Greedy in order: a file is closed when the next tensor would make it too large. A tensor
    larger than the limit gets a file of its own and does not close the current one. One file is
    model.safetensors, several are model-00001-of-0000N.safetensors. ValueError for a name given
    twice or no tensors.
    """
    limit = parse_size(max_shard_size)
    closed: list[list[TensorOut]] = []
    current: list[TensorOut] = []
    room = limit
    for tensor in tensors:
        if tensor.nbytes > limit:
            closed.append([tensor])
            continue
        if tensor.nbytes > room:
            closed.append(current)
            current, room = [], limit
        current.append(tensor)
        room -= tensor.nbytes
    shards = closed + [current] if current else closed
    names = [tensor.name for shard in shards for tensor in shard]
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"{len(names)} tensors with {len(set(names))} names cannot be planned")
    stem, count = SINGLE.removesuffix(".safetensors"), len(shards)
    if count == 1:
        return (plan_file(SINGLE, shards[0], notes),)
    return tuple(
        plan_file(f"{stem}-{i:05d}-of-{count:05d}.safetensors", shard, None if i > 1 else notes)
        for i, shard in enumerate(shards, 1)
    )


def plan_file(
    file: str, shard: Iterable[TensorOut], notes: Mapping[str, str] | None = None
) -> ShardPlan:
    """All these tensors in one file; `notes` are its metadata."""
    ordered = sorted(shard, key=lambda t: (RANK[t.dtype], t.name))
    header = encode_header(((t.name, t.dtype, t.shape) for t in ordered), notes)
    starts, position = [], len(header)
    for tensor in ordered:
        starts.append(position)
        position += tensor.nbytes
    return ShardPlan(file, tuple(ordered), header, tuple(starts), position)


def index_json(plans: Sequence[ShardPlan]) -> bytes:
    """The bytes of model.safetensors.index.json, which goes with more than one file.

    total_size counts all tensor bytes, total_parameters the elements as stored (two codes in a
    byte count once) of everything that is not a scale or another buffer.
    """
    tensors = [tensor for plan in plans for tensor in plan.tensors]
    parameters = [t for t in tensors if t.name.rpartition(".")[2] not in BUFFERS]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(t.shape) for t in parameters),
            "total_size": sum(t.nbytes for t in tensors),
        },
        "weight_map": {tensor.name: plan.file for plan in plans for tensor in plan.tensors},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
