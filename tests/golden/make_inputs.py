# SPDX-License-Identifier: Apache-2.0
"""Make inputs.npz: activations as NVIDIA ModelOpt 0.47.0 (torch 2.13, CPU) fake-quantizes them.

Run it in an environment that has torch and nvidia-modelopt: `python make_inputs.py [OUT.npz]`. The
inputs come from `inputs()`, which the test repeats, and are rounded to bf16; only answers are
stored, as bf16 bit patterns, key `case`, and what they were quantized with, keys `case|amax` and
`case|bias`. Cases in CONFIGS come out of ModelOpt's TensorQuantizer, calibrated on a batch of their
own. Those in WRITTEN need a GPU there: they come from the arithmetic of its kernels, written down
here in torch.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FP8, INT8 = {"num_bits": (4, 3)}, {"num_bits": 8}
BIAS = {-2: None, -4: None, "type": "static"}
# case: attributes of the quantizer, whether it is calibrated
CONFIGS: dict[str, tuple[dict[str, Any], bool]] = {
    "fp8": (FP8, True),
    "int8": (INT8, True),
    "fp8 without a scale": (FP8, False),
    "fp8_token": ({**FP8, "type": "dynamic", "block_sizes": {-1: None}}, False),
    "fp8_cast": ({**FP8, "use_constant_amax": True}, False),
    "fp8_affine": ({**FP8, "bias": BIAS}, True),
}


def inputs() -> dict[str, np.ndarray]:
    """float32 activations, `calibration` and `now`: [b, h, t, d] with tokens of very different
    size, a token and a block of zeros, blocks far below the others, an outlier that calibration did
    not see.
    """
    rng = np.random.RandomState(31)  # its stream is frozen
    shape = (2, 2, 4, 32)
    made = {}
    for name in ("calibration", "now"):
        size = np.exp(rng.standard_normal((2, 2, 4, 1)))
        made[name] = rng.standard_normal(shape) * size + 2 * np.sin(np.arange(32))
    now = made["now"]
    now[0, 0, 1] = 0
    now[0, 1, 1, 16:32] = 0
    now[0, 1, 2, :16] *= 1e-5
    now[1, 0, 3, 5] = -60
    return {name: x.astype(np.float32) for name, x in made.items()}


def quantized(config: dict[str, Any], calibrated: bool, batches: dict[str, Any]) -> dict[str, Any]:
    """What ModelOpt's quantizer makes of `now`."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    quantizer = TensorQuantizer(QuantizerAttributeConfig(**config))
    if calibrated:
        quantizer.disable_quant()
        quantizer.enable_calib()
        quantizer(batches["calibration"])
        if "bias" in config:
            quantizer.load_calib_bias()
        quantizer.load_calib_amax()
        quantizer.enable_quant()
        quantizer.disable_calib()
    out = {"": quantizer(batches["now"])}
    if calibrated:
        out["|amax"] = quantizer.amax
    return out | ({"|bias": quantizer.bias_value} if "bias" in config else {})


def nvfp4(x: Any, amax: Any) -> Any:
    """NVFP4 with a stored amax: block scales below 1e-5 count as 1."""
    import torch

    blocks = x.float().reshape(-1, 16)
    g = amax.float() / (6.0 * 448.0)
    largest = blocks.abs().amax(-1, keepdim=True)
    s = (largest / (6.0 * g)).clamp(max=448.0).to(torch.float8_e4m3fn).float() * g
    s = torch.where(s < 1e-5, torch.ones_like(s), s)
    return (e2m1(blocks.abs() / s) * s * blocks.sign()).reshape(x.shape).to(x.dtype)


def mx(x: Any, bound: float, rounded: Callable[[Any], Any]) -> Any:
    """Blocks of 32 with powers of two as scales."""
    import torch

    blocks = x.float().reshape(-1, 32)
    fraction, exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True) / bound)
    k = torch.where(fraction == 0.5, exponent - 1, exponent).float()
    scale = torch.exp2(torch.where(fraction == 0, torch.zeros_like(k), k))
    return (rounded(blocks.abs() / scale) * scale * blocks.sign()).reshape(x.shape).to(x.dtype)


def e2m1(a: Any) -> Any:
    """The nearest of the E2M1 numbers to a >= 0, ties to even."""
    import torch

    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    middle = (grid[1:] + grid[:-1]) / 2
    i = torch.searchsorted(middle, a.contiguous())
    tie = (i < 7) & (a == middle[i.clamp(max=6)]) & (i % 2 == 1)
    return grid[torch.where(tie, i + 1, i)]


def e4m3(a: Any) -> Any:
    """The nearest E4M3 number."""
    import torch

    return a.clamp(max=448.0).to(torch.float8_e4m3fn).float()


WRITTEN: dict[str, Callable[[Any, Any], Any]] = {
    "nvfp4": nvfp4,
    "mxfp4": lambda x, amax: mx(x, 6.0, e2m1),
    "mxfp8": lambda x, amax: mx(x, 448.0, e4m3),
}


def main(path: str) -> None:
    """Write the file."""
    import torch

    batches = {k: torch.from_numpy(x).to(torch.bfloat16) for k, x in inputs().items()}
    amax = batches["calibration"].abs().amax()
    found: dict[str, Any] = {}
    for case, (config, calibrated) in CONFIGS.items():
        made = quantized(config, calibrated, batches)
        found |= {f"{case}{key}": value for key, value in made.items()}
    for case, run in WRITTEN.items():
        found |= {case: run(batches["now"], amax), f"{case}|amax": amax}
    bits = {k: v.to(torch.bfloat16).contiguous().view(torch.int16) for k, v in found.items()}
    np.savez_compressed(path, **{k: v.numpy().view(np.uint16) for k, v in bits.items()})


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).with_name("inputs.npz")))
