# SPDX-License-Identifier: Apache-2.0
"""TARGETS: the layouts a checkpoint can be written in, as rows."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jqx.config import Choice
from jqx.tensors import QTensor
from jqx_interop.checkpoints import TensorOut

from . import ct_config, ct_layout, layout, modelopt
from .ct_schemes import METHOD, find_scheme

Describe = Callable[[Mapping[str, Choice], Iterable[str], str | None], dict[str, Any]]
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One layout: its arrays, its descriptions, and who reads it.

    `named` turns a QTensor into named arrays, the codes first, `outputs` tells them beforehand, and
    `gathered` puts them together again; `leaves` are all names they may have. `kv_name`: what the
    scale or bias `leaf` of the keys or values that the linear `path` makes is called; `kv_shape`:
    that of a scale.
    `quantization_config` gives what is added to config.json, `files` further descriptions by name.
    `supports`: whether it has a name for what is chosen for a linear; `kv_formats`: the formats of
    keys and values.
    """

    name: str
    readers: str
    named: Callable[[str, QTensor], dict[str, Any]]
    outputs: Callable[[str, Choice, Shape, np.dtype, bool], list[TensorOut]]
    gathered: Callable[[Mapping[str, np.ndarray], Choice, Shape, np.dtype], QTensor]
    leaves: tuple[str, ...]
    kv_name: Callable[[str, str], str]
    kv_shape: Shape
    quantization_config: Describe
    files: Mapping[str, Describe]
    supports: Callable[[Choice], bool]
    kv_formats: tuple[str, ...]


TARGETS = {
    target.name: target
    for target in (
        Target(
            name="modelopt",
            readers="vLLM, SGLang, TensorRT-LLM",
            named=layout.named,
            outputs=layout.outputs,
            gathered=layout.gathered,
            leaves=layout.LEAVES,
            kv_name=lambda path, leaf: f"{path}.{leaf}",
            kv_shape=(),
            quantization_config=modelopt.quantization_config,
            files={"hf_quant_config.json": modelopt.describe},
            supports=lambda choice: modelopt.find_algo(choice) is not None,
            kv_formats=tuple(modelopt.KV_ALGOS),
        ),
        Target(
            name=METHOD,
            readers="vLLM, SGLang, transformers",
            named=ct_layout.named,
            outputs=ct_layout.outputs,
            gathered=ct_layout.gathered,
            leaves=ct_layout.LEAVES,
            kv_name=lambda path, leaf: f"{path.rpartition('.')[0]}.{leaf}",
            kv_shape=(1,),
            quantization_config=ct_config.quantization_config,
            files={},
            supports=lambda choice: find_scheme(choice) is not None,
            kv_formats=tuple(ct_config.KV_SCHEMES),
        ),
    )
}
