# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk: its configuration and where every tensor lies.

Weights are read from safetensors only. Pickles (.bin, .pt, .pth) and Python files are never
opened.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .layout import TensorInfo, read_header
from .mapped import MappedTensors
from .problems import refuse
from .resolve import resolve_model

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
# Other people's layouts of the same weights, and weights of something else, beside the model.
NOT_THE_MODEL = re.compile(r"(consolidated|adapter_).*\.safetensors")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model directory whose files were found to agree with each other."""

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]  # in file order, shard after shard
    files: tuple[Path, ...]  # the safetensors files
    mapped: MappedTensors
    notes: Mapping[str, str] = field(default_factory=dict)  # metadata of the files
    source: str | None = None  # how its weights are stored, where they are decoded

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` as a read-only view of its file, in its stored dtype.

        bfloat16 and the float8 types are the ml_dtypes ones. KeyError if there is none.
        """
        return self.mapped.read(name)

    def check_numbers(self) -> None:
        """Raise InputError for numbers that weights cannot be decoded with: here none are."""

    def read_member(self, name: str, index: int) -> np.ndarray:
        """One of what the tensor `name` holds along its first axis."""
        return self.read(name)[index]

    def release(self, name: str) -> None:
        """Drop the resident pages of `name`; views of it stay valid."""
        self.mapped.release(name)


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a model directory or Hub id and check everything but the numbers.

    Headers and index are read, weights are not. Raises one InputError that lists what is wrong:
    no config.json, broken JSON, only pickles, missing, truncated or corrupt files, an index that
    does not fit its shards.
    """
    path = resolve_model(model)
    problems: list[str] = []
    config = _read_object(path / "config.json", problems)
    files, weight_map = _weight_files(path, problems)
    tensors: dict[str, TensorInfo] = {}
    notes: dict[str, str] = {}
    damaged = set()
    for file in files:
        header = read_header(file)
        notes |= header.notes
        problems += header.problems
        if header.problems:
            damaged.add(file.name)
        for tensor in header.tensors:
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                problems.append(f"tensor {tensor.name!r} is in {other} and in {file.name}")
            tensors[tensor.name] = tensor
    if weight_map is not None:
        problems += _index_problems(weight_map, tensors, damaged)
    if files and not tensors and not problems:
        problems.append("its safetensors files hold no tensors")
    if problems:
        refuse(model, problems)
    return Checkpoint(path, config, tensors, files, MappedTensors(tensors.values()), notes)


def read_beside(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in the file `name` of a checkpoint's directory; None where there is none.

    Raises InputError for a file that holds something else.
    """
    if not (folder / name).is_file():
        return None
    problems: list[str] = []
    found = _read_object(folder / name, problems)
    if problems:
        refuse(folder, problems)
    return found


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON object in a file; anything else adds to `problems` and gives an empty one."""
    try:
        value = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        problems.append(f"no {path.name}")
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        problems.append(f"{path.name} is not JSON: {error.msg} at {where}")
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        problems.append(f"{path.name} is not JSON: {error}")
    else:
        if isinstance(value, dict):
            return value
        problems.append(f"{path.name} holds a {type(value).__name__}, not a JSON object")
    return {}


def _weight_files(
    path: Path, problems: list[str]
) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The safetensors files of a model, and the index's weight map if there is an index.

    model.safetensors comes first, then the index, then all safetensors files there are.
    """
    if (path / SINGLE).exists():
        return (path / SINGLE,), None
    if (path / INDEX).exists():
        return _indexed_files(path, problems)
    files = sorted(f for f in path.glob("*.safetensors") if not f.name.startswith("."))
    files = [f for f in files if not NOT_THE_MODEL.fullmatch(f.name)] or files
    problems += _missing_numbers([f.name for f in files])
    if not files:
        pickles = sorted(f.name for f in path.iterdir() if f.suffix in PICKLES)
        problems.append(
            f"only pickled weights ({pickles[0]}), which are never opened: convert to safetensors"
            if pickles
            else "no safetensors file"
        )
    return tuple(files), None


def _indexed_files(path: Path, problems: list[str]) -> tuple[tuple[Path, ...], dict[str, str]]:
    before = len(problems)
    weight_map = _read_object(path / INDEX, problems).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        if len(problems) == before:
            problems.append(f"{INDEX} has no weight_map")
        return (), {}
    names = sorted({str(name) for name in weight_map.values()})
    inside = [n for n in names if Path(n).name == n and n.endswith(".safetensors")]
    problems += [
        f"{INDEX} names {n!r}, no safetensors file beside it" for n in names if n not in inside
    ]
    files = [path / name for name in inside]
    problems += [f"shard {f.name} is missing" for f in files if not f.exists()]
    return tuple(f for f in files if f.exists()), {str(k): str(v) for k, v in weight_map.items()}


def _missing_numbers(names: list[str]) -> list[str]:
    found = [match for match in map(NUMBERED.fullmatch, names) if match]
    wanted = {
        f"{match[1]}-{i:05d}-of-{match[3]}.safetensors"
        for match in found
        for i in range(1, int(match[3]) + 1)
    }
    return [f"shard {name} is missing" for name in sorted(wanted - set(names))]


def _index_problems(
    weight_map: dict[str, str], tensors: dict[str, TensorInfo], damaged: set[str]
) -> list[str]:
    """Where index and shards disagree. Shards with a problem of their own are not held to it."""
    present = {tensor.file.name for tensor in tensors.values()} - damaged
    problems = []
    for name, shard in weight_map.items():
        if shard in present and (name not in tensors or tensors[name].file.name != shard):
            problems.append(f"{INDEX} says {shard} holds {name!r}, which it does not")
    for name, tensor in tensors.items():
        if name not in weight_map:
            problems.append(f"{tensor.file.name} holds {name!r}, not in {INDEX}")
    return problems
