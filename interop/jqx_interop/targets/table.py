# SPDX-License-Identifier: Apache-2.0
"""TARGETS: the layouts a checkpoint can be written in, as rows."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jqx.config import Choice

from . import layout, modelopt

Describe = Callable[[Mapping[str, Choice], Iterable[str], str | None], dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One layout: its arrays, its descriptions, and who reads it.

    `named` turns a QTensor into named arrays, `outputs` tells them beforehand; `describe` gives the
    content of hf_quant_config.json, `quantization_config` what is added to config.json; `supports`
    whether it has a name for a pair of formats.
    """

    name: str
    readers: str
    named: Callable[..., dict[str, Any]]
    outputs: Callable[..., list[Any]]
    describe: Describe
    quantization_config: Describe
    supports: Callable[[Choice], bool]


TARGETS = {
    target.name: target
    for target in (
        Target(
            name="modelopt",
            readers="vLLM, SGLang, TensorRT-LLM",
            named=layout.named,
            outputs=layout.outputs,
            describe=modelopt.describe,
            quantization_config=modelopt.quantization_config,
            supports=lambda choice: modelopt.find_algo(choice) is not None,
        ),
    )
}
