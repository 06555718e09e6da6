# SPDX-License-Identifier: Apache-2.0
"""Make kv_affine.json: what ModelOpt's TensorQuantizer ends with for affine FP8 keys, input by
input.

Run in an environment that has torch and nvidia-modelopt: `python tests/golden/make_kv.py`. The
inputs come from `batches` below, which the test repeats; only ModelOpt's answers are stored, as
hexadecimal bf16 bit patterns.
"""

import json
import sys
from pathlib import Path

import numpy as np

# name: (seed, batches, shape [b, heads, t, d], a number added to some channels)
CASES = {
    "one batch": (0, 1, (2, 2, 16, 8), 3.0),
    "many batches": (1, 7, (4, 2, 32, 8), 1.0),
    "long": (2, 3, (1, 3, 384, 4), -5.0),
    "ragged": (3, 5, (3, 1, 11, 6), 0.3),
}


def batches(seed: int, count: int, shape: tuple[int, ...], offset: float) -> list[np.ndarray]:
    """The float32 inputs of a case; they are rounded to bf16 before use."""
    rng = np.random.default_rng(seed)
    centre = offset * rng.standard_normal((1, shape[1], 1, shape[3]))
    return [(rng.standard_normal(shape) + centre).astype(np.float32) for _ in range(count)]


def answers(inputs: list[np.ndarray]) -> dict[str, object]:
    """Bias and amax of ModelOpt's quantizer after these inputs."""
    import torch
    from modelopt.torch.quantization.config import FP8_AFFINE_KV_CFG, QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    *_, entry = FP8_AFFINE_KV_CFG["quant_cfg"]
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**entry["cfg"]))
    quantizer.disable_quant()
    quantizer.enable_calib()
    for x in inputs:
        quantizer(torch.from_numpy(x).to(torch.bfloat16))
    quantizer.load_calib_bias()
    quantizer.load_calib_amax()
    bias, amax = quantizer.bias_value, quantizer.amax
    assert bias.dtype == amax.dtype == torch.bfloat16
    hexadecimal = bias.flatten().view(torch.uint16).numpy().astype(">u2").tobytes().hex()
    return {"shape": list(bias.shape), "bias": hexadecimal, "amax": float(amax)}


if __name__ == "__main__":
    import modelopt
    import torch

    made_with = {"modelopt": modelopt.__version__, "torch": torch.__version__}
    cases = {name: answers(batches(*case)) for name, case in CASES.items()}
    path = Path(__file__).with_name("kv_affine.json")
    path.write_text(json.dumps({"made_with": made_with, "cases": cases}, indent=1) + "\n")
    print(f"{path}: {len(cases)} cases, python {sys.version_info.major}.{sys.version_info.minor}")
