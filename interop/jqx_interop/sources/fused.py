# SPDX-License-Identifier: Apache-2.0
"""Experts that ModelOpt stores in one tensor, as Llama 4 and GPT-OSS have them: [E, in, out].

gate_up_proj    FP8 [E, in, out], or NVFP4 [E, in / 2, out], the even row in the low bits
*_weight_scale  float32 [], or E4M3 [E, in / 16, out];  *_weight_scale_2  float32 []
"""

import numpy as np

from jqx.config import Choice
from jqx.formats import find_format
from jqx.tensors import QTensor
from jqx_interop.targets import TARGETS

from .weight import Arrays, Found, Given, Weight, decoded

SCALE, OUTER, INPUT = "_weight_scale", "_weight_scale_2", "_input_scale"
LEAVES = {
    "codes": "weight",
    "scale": "weight_scale",
    "outer": "weight_scale_2",
    "input_scale": "input_scale",
}
"""Part of a weight -> what it is called beside a linear."""

FUSED = ("gate_up_proj_weight_scale", "down_proj_weight_scale")
"""Endings of names by which such experts are known."""


def fused_weights(given: Given) -> Found:
    """Every tensor of experts with its scales, by name."""
    for name in given.tensors:
        base = name.removesuffix(SCALE)
        if base == name or base.endswith("."):
            continue
        if base not in given.tensors:
            yield f"tensor {base} is missing, which {name} scales"
            continue
        codes, scale = given.tensors[base], given.tensors[name]
        parts = {"codes": base, "scale": name}
        if base + INPUT in given.tensors:
            parts["input_scale"] = base + INPUT
        if codes.dtype == "F8_E4M3" and len(codes.shape) == 3:
            good = scale.shape in ((), (1,))
            needed, blocks = "[]", None
        elif codes.dtype == "U8" and len(codes.shape) == 3:
            experts, half, out = codes.shape
            blocks = (experts, half // 8, out)
            good, needed = scale.shape == blocks and half % 8 == 0, str(blocks)
            parts["outer"] = base + OUTER
            if parts["outer"] not in given.tensors:
                yield f"tensor {parts['outer']} is missing"
                continue
        else:
            yield f"tensor {base} is {codes.dtype} {codes.shape}: no experts in FP8 or NVFP4"
            continue
        if not good:
            yield f"tensor {name} has shape {scale.shape}, it should have {needed}"
        else:
            yield _weight(given, base, parts)


def _weight(given: Given, base: str, parts: dict[str, str]) -> Weight:
    experts, rows, out = given.tensors[base].shape
    fp4 = "outer" in parts
    fmt, k = ("nvfp4", 2 * rows) if fp4 else ("fp8", rows)
    choice = Choice(weight=fmt, input=fmt if "input_scale" in parts else None)

    def floats(arrays: Arrays, dtype: np.dtype) -> np.ndarray:
        codes = np.ascontiguousarray(np.swapaxes(arrays["codes"], 1, 2))
        lead = codes.shape[:1]
        one = arrays["outer" if fp4 else "scale"].astype(np.float32).reshape(())
        q = QTensor(
            codes=codes,
            scale=np.swapaxes(arrays["scale"], 1, 2) if fp4 else np.broadcast_to(one, lead),
            tensor_scale=np.broadcast_to(one, lead) if fp4 else None,
            format=find_format(fmt),
            dtype=given.dtype,
        )
        return np.ascontiguousarray(np.swapaxes(decoded(q, dtype), 1, 2))

    def stored(arrays: Arrays) -> QTensor:
        named = {LEAVES[leaf]: a.T if a.ndim == 2 else a for leaf, a in arrays.items()}
        return TARGETS["modelopt"].gathered(named, choice, (out, k), given.dtype)

    return Weight(
        name=base,
        shape=(experts, k, out),
        parts=parts,
        floats=floats,
        choice=choice,
        stored=stored,
        stacked=("codes", "scale") if fp4 else ("codes",),
    )
