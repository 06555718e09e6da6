# SPDX-License-Identifier: Apache-2.0
"""SOURCES: the ways in which others store quantized weights, as rows. All of them are decoded when
a checkpoint is quantized; those of a target's layout stay as they are when one is run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jqx.errors import InputError, nearest
from jqx_interop.targets import METHOD

from .fp8 import block_size, fp8_weights
from .fused import FUSED
from .integers import awq_weights, gptq_weights
from .layouts import ORDER, compressed_weights, modelopt_weights
from .mxfp4 import mxfp4_weights
from .weight import Found, Given


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceLayout:
    """`name`; `methods`: what quant_method says; `marks`: endings of names by which it is known
    where nothing is said; `tensors` and `means`: what lies on disk and what it decodes to, for
    people; `weights`: all weights and what is wrong; `title`: what a checkpoint of it is called;
    `target`: the row of TARGETS whose layout it is; `runs`: whether it is run as it is stored, and
    not decoded for that too; `meant`: what else must hold.
    """

    name: str
    methods: tuple[str, ...]
    tensors: str
    means: str
    weights: Callable[[Given], Found]
    title: Callable[[Given], str]
    marks: tuple[str, ...] = ()
    target: str | None = None
    runs: Callable[[Given], bool] = lambda given: False
    meant: Callable[[Given], bool] = lambda given: True


def _blocks(given: Given) -> str:
    rows, columns = block_size(given.said)
    return f"FP8, {rows}x{columns} blocks"


def _squares(given: Given) -> bool:
    return bool(given.said.get("weight_block_size")) or (
        not given.said and given.has(".weight_scale_inv")
    )


def _modelopt(given: Given) -> str:
    said = [given.file, given.said] if isinstance(given.file, dict) else [given.said]
    inner: list[dict[str, Any]] = [s.get("quantization", s) for s in said]
    names = (s.get("quant_algo") for s in inner if isinstance(s, dict))
    return f"ModelOpt {next((name for name in names if name), 'quantized')}"


def _in_order(given: Given) -> bool:
    said = given.said or given.file
    return said.get("bits") == 4 and not said.get("desc_act")


def _integers(given: Given, name: str) -> str:
    said = given.said or given.file
    return f"{name} INT{said.get('bits', said.get('w_bit', '?'))}"


SOURCES = {
    row.name: row
    for row in (
        SourceLayout(
            name="fp8-blocks",
            methods=("fp8",),
            marks=(".weight_scale_inv",),
            meant=_squares,
            tensors="`weight` FP8, `weight_scale_inv` [out / 128, in / 128], the last ones smaller",
            means="code * scale of its block",
            weights=fp8_weights,
            title=_blocks,
        ),
        SourceLayout(
            name="fp8",
            methods=("fp8", "fbgemm_fp8"),
            tensors="`weight` FP8, `weight_scale` or `weight_scale_inv` [], [out] or [out, 1]",
            means="code * scale of its row or of the tensor",
            weights=fp8_weights,
            title=lambda given: "FP8, scales of tensors or rows",
        ),
        SourceLayout(
            name="mxfp4",
            methods=("mxfp4",),
            marks=("_blocks", "_scales"),
            tensors="`*_blocks` [experts, out, in / 32, 16], `*_scales` [experts, out, in / 32]",
            means="code * 2^(scale - 127), as [experts, in, out]",
            weights=mxfp4_weights,
            title=lambda given: "MXFP4",
        ),
        SourceLayout(
            name="modelopt",
            methods=("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"),
            tensors="what jqx writes, and experts in one tensor (`gate_up_proj_weight_scale`)",
            means="code * scales, + low rank part, * `pre_quant_scale`",
            weights=modelopt_weights,
            title=_modelopt,
            target="modelopt",
            runs=lambda given: not given.has(*FUSED),
        ),
        SourceLayout(
            name=METHOD,
            methods=(METHOD,),
            tensors="`weight` or `weight_packed`, `weight_scale`, `weight_global_scale`, "
            "`weight_zero_point`",
            means="(code - zero) * scale, / global scale",
            weights=compressed_weights,
            title=lambda given: f"compressed-tensors {given.said.get('format', '')}".strip(),
            target=METHOD,
            runs=lambda given: not given.has(ORDER),
        ),
        SourceLayout(
            name="awq",
            methods=("awq",),
            tensors="`qweight` [in, out / 8], `qzeros`, `scales`",
            means="(code - zero) * scale of its block",
            weights=awq_weights,
            title=lambda given: _integers(given, "AWQ"),
            target="awq",
            runs=lambda given: True,
        ),
        SourceLayout(
            name="gptq",
            methods=("gptq",),
            tensors="`qweight` [in * bits / 32, out], `qzeros`, `scales`, `g_idx`; 2, 3, 4 or 8 "
            "bits, both versions, any order of columns",
            means="(code - zero) * scale of the block that `g_idx` names",
            weights=gptq_weights,
            title=lambda given: _integers(given, "GPTQ"),
            target="gptq",
            runs=_in_order,
        ),
    )
}


def find_source(given: Given, method: str | None) -> SourceLayout | None:
    """The row of a checkpoint whose description says `method`, or None where nothing says and no
    name tells that it is quantized. Raises InputError for a method that is not read.
    """
    if method is None:
        marked = (r for r in SOURCES.values() if r.marks and all(given.has(m) for m in r.marks))
        return next(marked, None)
    rows = [row for row in SOURCES.values() if method in row.methods]
    if not rows:
        known = dict.fromkeys(name for row in SOURCES.values() for name in row.methods)
        raise InputError(f"it is quantized, and {nearest(method, known, 'quant_method')}")
    return next((row for row in rows if row.meant(given)), rows[-1])
