# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint as they are: what is wrong with them is collected, not raised.

Weights are read from safetensors alone; pickles and Python files are never opened.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jqx.errors import InputError
from jqx_interop.checkpoints import MappedTensors, TensorInfo, one_line, resolve_model
from jqx_interop.checkpoints.layout import read_header
from jqx_interop.checkpoints.read import INDEX, NOT_THE_MODEL, SINGLE

from .problem import first

HF_QUANT = "hf_quant_config.json"
TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json"),
    *("spiece.model", "sentencepiece.bpe.model", "vocab.txt", "qwen.tiktoken"),
)

Problems = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Files:
    """A checkpoint's directory. `file`: the content of hf_quant_config.json, None without one;
    `tensors` in file order; `damaged`: files that are missing or broken; `problems`: (rule, text).
    """

    path: Path
    config: Mapping[str, Any]
    file: object
    tensors: Mapping[str, TensorInfo]
    mapped: MappedTensors
    damaged: frozenset[str]
    problems: tuple[tuple[str, str], ...]


def read_files(model: str | Path) -> Files:
    """Look at the directory `model`, or that of a Hub id.

    Raises InputError where there is no checkpoint: no directory, or one with neither config.json
    nor safetensors.
    """
    path = resolve_model(model)
    problems: Problems = []
    present = sorted(f.name for f in path.glob("*.safetensors") if not f.name.startswith("."))
    if not present and not (path / "config.json").exists():
        text = "is no checkpoint: it has neither config.json nor a safetensors file"
        raise InputError(one_line(f"{path} {text}"))
    config = _json(path / "config.json", "config", problems)
    if not (path / "config.json").exists():
        problems.append(("config", "no config.json"))
    index = _index(path, problems)
    names = _weight_files(present, index, problems)
    tensors: dict[str, TensorInfo] = {}
    damaged = set()
    for name in names:
        damaged |= {name} if _read(path / name, index, tensors, problems) else set()
    if not names:
        problems.append(("shard", "no safetensors file"))
    problems += [] if index else _strays(path, present, tensors, names)
    problems += _index_problems(index, tensors, damaged)
    problems += _total_size(path, tensors) if not damaged else ()
    problems += _tokenizer(path)
    return Files(
        path=path,
        config=config if isinstance(config, dict) else {},
        file=_json(path / HF_QUANT, "description", problems),
        tensors=tensors,
        mapped=MappedTensors(tensors.values()),
        damaged=frozenset(damaged),
        problems=tuple(problems),
    )


def _json(path: Path, rule: str, problems: Problems) -> object:
    """The value in a file, None without one or with one that cannot be read."""
    try:
        value = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append((rule, f"{path.name} cannot be read: {error.strerror}"))
        return None
    except (ValueError, RecursionError) as error:
        problems.append((rule, one_line(f"{path.name} is not JSON: {error}")))
        return None
    if not isinstance(value, dict):
        text = f"{path.name} holds a {type(value).__name__}, not a JSON object"
        problems.append((rule, text))
    return value


def _index(path: Path, problems: Problems) -> dict[str, str]:
    """Tensor -> file, as the index says; empty without one."""
    if not (path / INDEX).exists():
        return {}
    found = _json(path / INDEX, "index", problems)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict):
        problems.append(("index", f"{INDEX} has no weight_map"))
        return {}
    if not weight_map:
        problems.append(("index", f"{INDEX} has an empty weight_map"))
    good: dict[str, str] = {}
    for name, file in weight_map.items():
        if isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors"):
            good[name] = file
        else:
            text = f"{INDEX} says {name} is in {file!r:.60}, no safetensors file beside it"
            problems.append(("index", one_line(text)))
    return good


def _weight_files(present: list[str], index: Mapping[str, str], problems: Problems) -> list[str]:
    """The files that engines read: those of the index if there is one."""
    names = [n for n in present if not NOT_THE_MODEL.fullmatch(n)] or present
    if not index:
        return [SINGLE] if SINGLE in names else names
    named = sorted(set(index.values()))
    for name in names:
        if name not in named:
            told = "most engines do not read it"
            told += ", and transformers reads nothing else" if name == SINGLE else ""
            problems.append(("index-extra", f"{name} is named nowhere in {INDEX}: {told}"))
    return named


def _strays(
    path: Path, present: list[str], tensors: Mapping[str, TensorInfo], read: list[str]
) -> Iterator[tuple[str, str]]:
    """Files beside those that hold the model, which engines that read every file read, too."""
    for name in present:
        if name in read or NOT_THE_MODEL.fullmatch(name):
            continue
        header = read_header(path / name)
        own = [info.name for info in header.tensors if info.name not in tensors]
        if own or header.problems:
            own = own or ["a header that is damaged"]
            yield "stray-file", one_line(f"{name} beside {', '.join(read)} has {first(own)}")
        else:
            yield "same-file", one_line(f"{name} beside {', '.join(read)} has the same tensors")


def _read(
    file: Path, index: Mapping[str, str], tensors: dict[str, TensorInfo], problems: Problems
) -> bool:
    """Add what the header of a file says; whether the file is missing or broken."""
    if not file.exists():
        problems.append(("shard", f"{file.name} is missing"))
        return True
    header = read_header(file)
    problems += [("shard", one_line(problem)) for problem in header.problems]
    for tensor in header.tensors:
        if tensor.name in tensors:
            other = tensors[tensor.name].file.name
            problems.append(("duplicate", f"{tensor.name} is in {other} and in {file.name}"))
            if index.get(tensor.name) == other:
                continue
        tensors[tensor.name] = tensor
    return bool(header.problems)


def _index_problems(
    index: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    damaged: set[str],
) -> Iterator[tuple[str, str]]:
    """Where index and files disagree. Damaged files are not held to it."""
    if not index:
        return
    for name, file in index.items():
        info = tensors.get(name)
        if file not in damaged and (info is None or info.file.name != file):
            where = "no file does" if info is None else f"{info.file.name} does"
            yield "index", f"{INDEX} says {file} holds {name}, and {where}"
    for name, info in tensors.items():
        if name not in index and info.file.name not in damaged:
            yield "index", f"{info.file.name} holds {name}, which is not in {INDEX}"


def _total_size(path: Path, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    if not (path / INDEX).exists():
        return
    found = _json(path / INDEX, "index", [])
    metadata = found.get("metadata") if isinstance(found, dict) else None
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    if said is None:
        return
    size = sum(info.nbytes for info in tensors.values())
    if said != size:
        yield "index-size", f"{INDEX} has total_size {said!r:.40}, and the tensors take {size}"


def _tokenizer(path: Path) -> Iterator[tuple[str, str]]:
    present = [name for name in TOKENIZERS if (path / name).exists()]
    if not present:
        yield "tokenizer", f"no tokenizer: none of {', '.join(TOKENIZERS[:3])} is there"
    for name in present:
        problems: Problems = []
        if (path / name).is_file() and not (path / name).stat().st_size:
            problems.append(("tokenizer", f"{name} is empty"))
        elif name == "tokenizer.json":
            _json(path / name, "tokenizer", problems)
        yield from problems
