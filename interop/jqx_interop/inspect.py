# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint is, told from its configuration and headers: no weight is read."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jqx.errors import InputError
from jqx.models import Experts, ModelSpec

from .checkpoints import Checkpoint, TensorInfo, open_checkpoint
from .families import spec_from_config
from .sources import as_floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """All tensors of one dtype together."""

    dtype: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """`facts`: name -> value for people; `quantization`: algorithm, KV cache and ignored modules,
    or None.
    """

    path: str
    facts: dict[str, Any]
    dtypes: tuple[Stored, ...]
    quantization: dict[str, Any] | None
    tensors: tuple[TensorInfo, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        data = asdict(self)
        data["tensors"] = [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "file": t.file.name}
            for t in self.tensors
        ]
        return data


def inspect_checkpoint(model: str | Path) -> Inspection:
    """Look at the checkpoint `model`. Raises InputError if it cannot be read."""
    checkpoint = open_checkpoint(model)
    quantization = _quantization(checkpoint)
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    facts: dict[str, Any] = {
        "model_type": checkpoint.config.get("model_type"),
        "architecture": ", ".join(checkpoint.config.get("architectures") or []) or None,
        "calibration here": _support(checkpoint),
        **_sizes(checkpoint),
        **_experts(checkpoint),
        "tensors": len(checkpoint.tensors),
        "files": len(checkpoint.files),
        "bytes": total,
    }
    if quantization:
        facts["quantized"] = quantization["quant_algo"]
        facts["KV cache"] = quantization["kv_cache"]
    facts["as a source"] = _as_source(checkpoint)
    return Inspection(
        path=str(checkpoint.path),
        facts=facts,
        dtypes=tuple(_stored(checkpoint)),
        quantization=quantization,
        tensors=tuple(checkpoint.tensors.values()),
    )


def _support(checkpoint: Checkpoint) -> str:
    try:
        _spec(checkpoint)
    except InputError as error:
        return f"formats without calibration only: {error}"
    return "every format"


def _as_source(checkpoint: Checkpoint) -> str | None:
    """What a quantized checkpoint is to those that read it as a source."""
    try:
        found = as_floats(checkpoint)
    except InputError as error:
        return f"not read: {error}"
    return None if found.source is None else f"{found.source}, decoded"


def _spec(checkpoint: Checkpoint) -> ModelSpec:
    """Raises InputError for what is not defined here."""
    plain = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    return spec_from_config(plain)


def _experts(checkpoint: Checkpoint) -> dict[str, str]:
    """How many experts a layer has, and a token takes; nothing where there are none."""
    try:
        blocks = _spec(checkpoint).blocks
    except InputError:
        return {}
    rows = dict.fromkeys(kind.mlp for kind in blocks if isinstance(kind.mlp, Experts))
    told = [f"{row.number} of {row.each.inner}, {row.top_k} for each token" for row in rows]
    return {"experts": "; ".join(told)} if told else {}


def _sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    keys = {
        "layers": "num_hidden_layers",
        "hidden size": "hidden_size",
        "MLP size": "intermediate_size",
        "heads": "num_attention_heads",
        "KV heads": "num_key_value_heads",
        "vocabulary": "vocab_size",
    }
    return {label: checkpoint.config.get(key) for label, key in keys.items()}


def _stored(checkpoint: Checkpoint) -> list[Stored]:
    kinds: dict[str, list[TensorInfo]] = {}
    for info in checkpoint.tensors.values():
        kinds.setdefault(info.dtype, []).append(info)
    return [
        Stored(
            dtype=dtype,
            tensors=len(infos),
            parameters=sum(math.prod(info.shape) for info in infos),
            bytes=sum(info.nbytes for info in infos),
        )
        for dtype, infos in sorted(kinds.items())
    ]


def _quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    found = checkpoint.config.get("quantization_config")
    if not isinstance(found, dict):
        return None
    scheme = found.get("kv_cache_scheme")
    kv = f"{scheme.get('type')} {scheme.get('num_bits')}" if isinstance(scheme, dict) else scheme
    return {
        "quant_method": found.get("quant_method"),
        "quant_algo": found.get("quant_algo") or found.get("format") or found.get("quant_method"),
        "kv_cache": kv or "as it is",
        "ignore": list(found.get("ignore") or found.get("modules_to_not_convert") or []),
    }
