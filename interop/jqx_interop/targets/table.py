# SPDX-License-Identifier: Apache-2.0
"""TARGETS: the layouts a checkpoint can be written in, as rows."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jqx.config import Choice
from jqx.tensors import QTensor
from jqx_interop.checkpoints import TensorOut

from . import ct_config, ct_layout, int4_config, int4_layout, layout, modelopt
from .ct_schemes import METHOD, find_scheme
from .reading import QUANTIZE_CONFIG, Meant, Said, read_compressed_tensors, read_int4, read_modelopt

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
    keys and values. `read`: what its descriptions mean; `method`: the quant_method by which they
    say whose they are. `shifted`: whether the arrays of a linear have zero points, for which
    QTensors have no codes; `unread`: why they cannot be read; `beside`: arrays that a linear of
    others may have and none of ours.

    `scale`: the leaf that every quantized linear has; `optional`: leaves that others leave out;
    `any_float`: leaves that others store in other floating-point dtypes; `zero_biases`: whether
    others give linears biases that the model has not. `half_scales`: whether scales are float16.
    `uniform`: whether all linears have one format; `multiple`: what divides both axes of a weight.
    `fused`: formats of weights and inputs in which experts that lie in one tensor stay in one.
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
    read: Callable[[Said], Meant | None]
    method: str
    shifted: Callable[[Mapping[str, np.ndarray]], bool] = lambda arrays: False
    unread: Callable[[Mapping[str, np.ndarray]], str | None] = lambda arrays: None
    beside: Callable[[str, Choice, Shape], list[TensorOut]] = lambda path, choice, shape: []
    scale: str = "weight_scale"
    optional: tuple[str, ...] = ()
    any_float: tuple[str, ...] = ()
    zero_biases: bool = False
    half_scales: bool = False
    uniform: bool = False
    multiple: int = 1
    fused: tuple[tuple[str, str | None], ...] = ()

    def fuses(self, choice: Choice) -> bool:
        """Whether experts in this format share the tensors that they share in the source."""
        return choice.variant is None and (choice.weight, choice.input) in self.fused

    def nothing(self, names: Iterable[str], parameters: Collection[str]) -> set[str]:
        """Those of the tensors `names` that are there and add nothing: biases of zeros that others
        give linears without.
        """
        biases = (n for n in names if n.endswith(".bias") and n not in parameters)
        return set(biases) if self.zero_biases else set()

    @property
    def smooths(self) -> bool:
        """Whether there is a place for what inputs are multiplied by."""
        return "pre_quant_scale" in self.leaves

    def lacks(self, choice: Choice, shape: Shape) -> str | None:
        """Why a weight of `shape` cannot be stored as `choice` says; None if it can."""
        if not self.supports(choice):
            beside = f" and {choice.variant} factors" if choice.variant else ""
            inputs = "plain" if choice.input is None else choice.input
            way_out = ": leave --no-fold out" if choice.variant in ("awq", "smooth") else ""
            told = f"{self.name} has no name for {choice.weight} with {inputs} inputs{beside}"
            return told + ("" if self.smooths else way_out)
        if any(size % self.multiple for size in shape):
            told = " x ".join(map(str, shape))
            return (
                f"{self.name} packs {self.multiple} codes together, and {self.multiple} does not "
                f"divide both axes of {told}: leave this weight out, a rule with weight null"
            )
        return None

    def apart(self, choices: Mapping[str, Choice]) -> str | None:
        """Why these formats cannot be in one checkpoint; None if they can."""
        found = {choice: path for path, choice in choices.items()}
        if not self.uniform or len(found) < 2:
            return None
        told = ", ".join(f"{choice.weight} ({path})" for choice, path in found.items())
        return (
            f"{self.name} holds one format in a checkpoint, and there are {told}: give all linears "
            "one, or take another target"
        )


SMALL = ("qzeros", ct_layout.ZERO_POINT, int4_layout.INDEX)
"""Leaves beside codes and scales that decide whether codes can be read, in some layout."""

_NO_KV = "keys and values are not quantized in this layout"


def _int4(name: str, arrays: int4_layout.Int4Layout, describe: Describe, *files: str) -> Target:
    """A layout of INT4 weights alone, described in config.json and again in `files`."""

    def kv_name(path: str, leaf: str) -> str:
        raise AssertionError(_NO_KV)

    return Target(
        name=name,
        readers="vLLM, SGLang, transformers",
        named=arrays.named,
        outputs=arrays.outputs,
        gathered=arrays.gathered,
        leaves=tuple(leaf for leaf in int4_layout.LEAVES if arrays.indexed or leaf != "g_idx"),
        kv_name=kv_name,
        kv_shape=(),
        quantization_config=describe,
        files=dict.fromkeys(files, describe),
        supports=int4_layout.is_int4,
        kv_formats=(),
        read=read_int4,
        method=name.partition("-")[0],
        shifted=arrays.shifted,
        unread=int4_layout.unread,
        beside=int4_layout.zero_biases,
        scale="scales",
        optional=("g_idx",),
        any_float=("scales",),
        zero_biases=True,
        half_scales=True,
        uniform=True,
        multiple=int4_layout.EIGHT,
    )


_GPTQ_V1 = partial(int4_config.gptq_config, version=int4_config.GPTQ)

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
            read=read_modelopt,
            method="modelopt",
            fused=(("fp8", "fp8"), ("nvfp4", "nvfp4"), ("nvfp4", None)),
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
            read=read_compressed_tensors,
            method=METHOD,
            any_float=("weight_scale", "input_scale", "k_scale", "v_scale"),
            shifted=ct_layout.has_zero_points,
            beside=ct_layout.zero_points,
        ),
        _int4("awq", int4_layout.AUTOAWQ, int4_config.awq_config),
        _int4("gptq", int4_layout.GPTQ, int4_config.gptq_config, QUANTIZE_CONFIG),
        _int4("gptq-v1", int4_layout.GPTQ_V1, _GPTQ_V1, QUANTIZE_CONFIG),
    )
}
