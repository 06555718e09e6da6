# SPDX-License-Identifier: Apache-2.0
"""What the descriptions of a quantized checkpoint mean, layout by layout."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jqx.config import Choice

from . import ct_config, int4_config
from .ct_schemes import METHOD
from .modelopt_choices import choices_of, kv_of
from .modelopt_read import read_stated

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What lies before a reader: `inline`, the quantization_config of config.json; `file`, the
    content of the layout's other file; None for what is not there. `linears` and `stored`: the
    shapes of the weights of all linears, by path, and of all tensors, by name.
    """

    inline: Any
    file: Any
    linears: Mapping[str, Shape]
    stored: Mapping[str, Shape]

    def has(self, leaf: str) -> bool:
        """Whether some module has a tensor called `leaf`."""
        return any(name.rpartition(".")[2] == leaf for name in self.stored)


@dataclass(frozen=True, kw_only=True, slots=True)
class Meant:
    """The formats of quantized linears in module order and that of keys and values; `problems`:
    what is wrong.
    """

    choices: Mapping[str, Choice]
    kv: str | None = None
    problems: tuple[str, ...] = ()


def read_modelopt(said: Said) -> Meant | None:
    """Of ModelOpt; None where there are no descriptions."""
    stated = read_stated(said.inline, said.file)
    if stated is None:
        return None
    names = (f"{path}.weight_scale" for path in said.linears)
    scales = {n.rpartition(".")[0]: said.stored[n] for n in names if n in said.stored}
    strangers = tuple(
        f"{path} is described as quantized and is no linear of the model"
        for path in stated.layers or ()
        if path not in said.linears
    )
    kv = kv_of(stated.kv, scales=said.has("k_scale"), biases=said.has("k_bias"))
    return Meant(choices=choices_of(stated, said.linears, scales), kv=kv, problems=strangers)


def read_compressed_tensors(said: Said) -> Meant:
    """Of compressed-tensors."""
    described = ct_config.read_described(said.inline)
    kv = ("fp8" if said.has("k_scale") else "fp8_cast") if described.kv else None
    return Meant(choices=ct_config.choices_of(described, said.linears), kv=kv)


def read_int4(said: Said) -> Meant:
    """Of AutoAWQ and GPTQ."""
    return Meant(choices=int4_config.int4_choices(said.file, said.linears, said.stored))


QUANTIZE_CONFIG = "quantize_config.json"
OLD_FILES = {QUANTIZE_CONFIG: int4_config.GPTQ, "quant_config.json": int4_config.AWQ}
"""Where AutoGPTQ and AutoAWQ once said what config.json says today -> the layout."""


def layout_of(
    inline: Any, read_file: Callable[[str], Any], names: Iterable[str]
) -> tuple[str, Any]:
    """The name of the layout that the descriptions are of, a row of TARGETS, and the content of its
    other file; `read_file` gives the content of a file of a name, None where there is none;
    `names`: those of all tensors.
    """
    said = inline if isinstance(inline, Mapping) else {}
    method = said.get("quant_method")
    if method == METHOD:
        return METHOD, None
    if inline is None and any(name.endswith(".qweight") for name in names):
        for name, meant in OLD_FILES.items():
            if isinstance(file := read_file(name), Mapping):
                said, method = file, meant
                break
    if method == int4_config.AWQ:
        return int4_config.AWQ, said
    if method == int4_config.GPTQ:
        second = int4_config.version_of(said) == int4_config.V2
        return "gptq" if second else "gptq-v1", said
    return "modelopt", read_file("hf_quant_config.json")
