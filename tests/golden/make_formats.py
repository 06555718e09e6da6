# SPDX-License-Identifier: Apache-2.0
"""Makes formats.npz: small weights, encoded by NVIDIA ModelOpt 0.47.0 (torch 2.13, CPU) as its
exporter does.

Run it with a Python that has torch and nvidia-modelopt: `python make_formats.py [OUT.npz]`. The
weights come from `weights()` and are cast to the dtype of a case. Keys: `format|dtype|case|array`,
where array is codes, scale, tensor_scale or amax (what ModelOpt kept for the case) and case is max:
amax from the weight; amax: half of it, or twice for formats with a tensor scale; ragged: edges of
128 x 128 blocks. Arrays of float8 are stored as their bytes.
"""

import copy
import sys
import warnings
from pathlib import Path

import numpy as np

CONFIGS = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_channel": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8_block": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int8": "INT8_WEIGHT_ONLY_CFG",
    "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "nvfp4": "W4A16_NVFP4_CFG",
    "nvfp4_b32": "NVFP4_MLP_WEIGHT_ONLY_CFG",
    "nvfp4_b32_fp8": "W4A8_NVFP4_FP8_CFG",
    "mxfp4": "MXFP4_DEFAULT_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
}
NAMES = {"weight": "codes", "weight_scale": "scale", "weight_scale_2": "tensor_scale"}


def weights() -> dict[str, np.ndarray]:
    """float32 weights with an outlier, zeros, ties, tiny and subnormal values, and rows of very
    different size.
    """
    rng = np.random.RandomState(20)  # its stream is frozen
    w = rng.standard_normal((8, 128)) * np.array([1, 1, 0, 1, 1e-3, 1, 30, 1])[:, None] * 0.02
    w[1, 5] = 2688 * 2.0**-9  # makes the tensor scale of nvfp4 a power of two
    w[1, 64:96] = 0.0
    w[3, 3:60:7] = -1e-40
    w[3, 96:] = np.where(np.arange(32) % 2, 1e-40, -1e-40)
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    w[5, :64] = np.tile(np.concatenate([ties, -ties]), 4) * 2.0**-5
    w[5, 64:] = np.tile(np.arange(32) - 15.5, 2) * 2.0**-8
    w[7, ::2] = np.linspace(-1, 1, 64) * 0.02
    ragged = rng.standard_normal((130, 20)) * 0.02 * np.exp(rng.standard_normal((130, 1)))
    return {"weight": w.astype(np.float32), "ragged": ragged.astype(np.float32)}


def export(w, name, factor):
    """ModelOpt's stored arrays of the torch matrix `w`, after its amax was multiplied by
    `factor`.
    """
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export.unified_export_hf import _export_quantized_weight

    model = torch.nn.Sequential()
    model.add_module("mlp", torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype))
    model.mlp.weight.data = w.clone()
    x = torch.ones(4, w.shape[1], dtype=w.dtype)
    mtq.quantize(model, copy.deepcopy(getattr(mtq, CONFIGS[name])), lambda m: m(x))
    quantizer = model.mlp.weight_quantizer
    if hasattr(quantizer, "_amax"):
        quantizer._amax *= factor
    amax = quantizer._amax.float().clone() if hasattr(quantizer, "_amax") else None
    with torch.inference_mode():
        _export_quantized_weight(model.mlp, w.dtype)
    state = model.mlp.state_dict()
    out = {NAMES[k]: v.contiguous() for k, v in state.items() if k in NAMES}
    return {**out, "amax": amax} if amax is not None else out


def plain(t):
    """A torch tensor as NumPy, float8 as bytes."""
    import torch

    return (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t).numpy()


def main(path: str) -> None:
    """Write the file."""
    import torch

    warnings.filterwarnings("ignore")
    arrays = weights()
    cases = [("weight", "bfloat16", "max", 1.0), ("weight", "float16", "max", 1.0)]
    cases += [("weight", "float32", "max", 1.0), ("weight", "bfloat16", "amax", None)]
    cases += [("ragged", "bfloat16", "ragged", 1.0)]
    stored = {}
    for source, dtype, case, factor in cases:
        w = torch.from_numpy(arrays[source]).to(getattr(torch, dtype))
        for name in ["fp8_block"] if case == "ragged" else CONFIGS:
            f = factor or (2.0 if name.startswith("nvfp4") else 0.5)
            for k, v in export(w, name, f).items():
                stored[f"{name}|{dtype}|{case}|{k}"] = plain(v)
    np.savez_compressed(path, **stored)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).with_name("formats.npz")))
