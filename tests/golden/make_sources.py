# SPDX-License-Identifier: Apache-2.0
"""Quantized weights of others and what their own code decodes them to: `python
tests/golden/make_sources.py` writes sources.npz beside this file. Run it where transformers and
ModelOpt are, and again where auto-round is: answers that cannot be had stay as they were.

Made with transformers 5.14.1, ModelOpt 0.47.0, auto-round 0.15.1 and torch 2.13.0 (CPU).
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

OUT = Path(__file__).with_name("sources.npz")
Answers = dict[str, np.ndarray]


def plain(x: torch.Tensor) -> np.ndarray:
    """As NumPy has it; small floats as bits."""
    if x.dtype == torch.float8_e4m3fn:
        return x.contiguous().view(torch.uint8).numpy()
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(np.uint16)
    return x.float().numpy() if x.is_floating_point() else x.numpy()


def fp8_blocks() -> Answers:
    """FP8 in whole blocks of 128x128: the code refuses others."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    codes = torch.randn(256, 128).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 1) + 0.1
    decoded = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
    return {"weight": plain(codes), "scale": plain(scale), "decoded": plain(decoded)}


def mxfp4() -> Answers:
    """MXFP4 of experts."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(1)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 135, (2, 6, 3), dtype=torch.uint8)
    decoded = convert_moe_packed_tensors(blocks, scales)
    return {"blocks": plain(blocks), "scales": plain(scales), "decoded": plain(decoded)}


def cast(low: int) -> Callable[[], Answers]:
    """MXFP4 that becomes NVFP4; `low`: the least exponent."""

    def made() -> Answers:
        from modelopt.torch.export.shard_cast_utils import (
            mxfp4_kmax,
            quantize_mxfp4_to_nvfp4_lossless,
        )

        torch.manual_seed(low)
        packed = torch.randint(0, 256, (24, 64), dtype=torch.uint8)
        scales = torch.randint(low, 131, (24, 4), dtype=torch.uint8)
        packed[::2] &= 0x33  # blocks that do not reach 6
        packed[3], scales[3] = 0, 0  # blocks of zeros
        top = mxfp4_kmax(scales)
        found = quantize_mxfp4_to_nvfp4_lossless(packed, scales, top, "cpu")
        codes, scale, outer, blocks, exact = found
        return {
            "packed": plain(packed),
            "scales": plain(scales),
            "codes": plain(codes),
            "scale": plain(scale),
            "outer": plain(outer),
            "exact": np.array([blocks, exact]),
        }

    return made


def gptq(bits: int, module: str) -> Callable[[], Answers]:
    """GPTQ in the version that a module knows; the code multiplies by the identity."""

    def made() -> Answers:
        QuantLinear = import_module(f"auto_round_extension.torch.{module}").QuantLinear
        torch.manual_seed(bits)
        layer = QuantLinear(bits, 32, 64, 32, False, g_idx=True)
        high = 2**31
        for name in ("qweight", "qzeros"):
            words = getattr(layer, name)
            setattr(layer, name, torch.randint(-high, high, words.shape).to(torch.int32))
        layer.scales = (torch.rand(layer.scales.shape) + 0.01).half()
        layer.post_init()
        decoded = layer(torch.eye(64)).T
        found = {n: plain(getattr(layer, n)) for n in ("qweight", "qzeros", "scales")}
        return {**found, "decoded": plain(decoded)}

    return made


CASES = {
    "fp8 blocks": fp8_blocks,
    "mxfp4": mxfp4,
    "cast": cast(115),
    "cast beyond": cast(95),
    **{f"gptq {bits}": gptq(bits, "qlinear_torch_zp") for bits in (2, 3, 4, 8)},
    **{f"gptq_v2 {bits}": gptq(bits, "qlinear_torch") for bits in (3, 4)},
}


def main() -> None:
    """Write what can be had here."""
    answers = dict(np.load(OUT)) if OUT.exists() else {}
    for case, made in CASES.items():
        try:
            answers |= {f"{case}|{name}": array for name, array in made().items()}
        except ImportError as error:
            print(f"{case}: as it was ({error})")
    np.savez_compressed(OUT, **answers)


if __name__ == "__main__":
    main()
