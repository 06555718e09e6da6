# SPDX-License-Identifier: Apache-2.0
"""Small matrices as compressed-tensors stores them: `python tests/golden/make_compressed.py` writes
compressed.npz beside this file: what its compressors make of scales found here, and what they
decompress that to.

Made with compressed-tensors 0.20.1 and torch 2.13.0 (CPU).
"""

from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

FLOAT4, FLOAT8 = {"num_bits": 4, "type": "float"}, {"num_bits": 8, "type": "float"}
INT4, INT8 = {"num_bits": 4, "type": "int"}, {"num_bits": 8, "type": "int"}
MX = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
SHIFTED = {"symmetric": False}
CASES = {
    "int4 group": ("pack-quantized", INT4 | {"strategy": "group", "group_size": 32}),
    "int4 channel": ("pack-quantized", INT4 | {"strategy": "channel"}),
    "int8 packed": ("pack-quantized", INT8 | {"strategy": "channel"}),
    "int8": ("int-quantized", INT8 | {"strategy": "channel"}),
    "fp8": ("float-quantized", FLOAT8 | {"strategy": "tensor"}),
    "fp8 channel": ("float-quantized", FLOAT8 | {"strategy": "channel"}),
    "fp8 block": (
        "float-quantized",
        FLOAT8 | {"strategy": "block", "block_structure": [128, 128]},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        FLOAT4 | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn},
    ),
    "mxfp4": ("mxfp4-pack-quantized", FLOAT4 | MX),
    "mxfp8": ("mxfp8-quantized", FLOAT8 | MX),
    "int4 zeros": ("pack-quantized", INT4 | SHIFTED | {"strategy": "group", "group_size": 32}),
    "int8 zeros": ("pack-quantized", INT8 | SHIFTED | {"strategy": "channel"}),
}
LARGEST = {("int", 4): 7.0, ("int", 8): 127.0, ("float", 4): 6.0, ("float", 8): 448.0}


def blocks(w: torch.Tensor, args: dict) -> torch.Tensor:
    """The largest magnitudes, in the shape of the scales."""
    if args["strategy"] == "tensor":
        return w.abs().amax().reshape(1)
    if args["strategy"] == "channel":
        return w.abs().amax(1, keepdim=True)
    if args["strategy"] == "block":
        return w.abs().reshape(w.shape[0] // 128, 128, -1, 128).amax((1, 3))
    return w.abs().reshape(w.shape[0], -1, args["group_size"]).amax(2)


def scales(w: torch.Tensor, args: dict) -> dict[str, torch.Tensor]:
    """What a compressor is given beside the weight."""
    scale = blocks(w, args) / LARGEST[args["type"], args["num_bits"]]
    if args["strategy"] == "tensor_group":
        whole = 448.0 * 6.0 / w.abs().amax().reshape(1)
        return {
            "weight_scale": (scale * whole).to(torch.float8_e4m3fn).float(),
            "weight_global_scale": whole,
        }
    if args.get("scale_dtype") == torch.uint8:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    if not args.get("symmetric", True):
        low = {4: 8, 8: 128}[args["num_bits"]]
        zeros = torch.arange(scale.numel()).reshape(scale.shape) % 5 - 2 - low // 4
        return {"weight_scale": scale, "weight_zero_point": zeros.to(torch.int8)}
    return {"weight_scale": scale}


def plain(x: torch.Tensor) -> np.ndarray:
    """As NumPy has it, numbers of eight bits as bytes."""
    if x.dtype == torch.float8_e4m3fn:
        return x.contiguous().view(torch.uint8).numpy()
    return x.float().numpy() if x.is_floating_point() else x.numpy()


def main() -> None:
    found = {}
    for name, (form, args) in CASES.items():
        rows = 128 if "block" in name else 16 if "zeros" in name else 6
        w = np.random.RandomState(len(found)).standard_normal((rows, 256)).astype(np.float32)
        w = torch.from_numpy(w.astype(ml_dtypes.bfloat16).astype(np.float32))
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(**({"symmetric": True} | args)),
            format=form,
        )
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress({"weight": w, **scales(w, args)}, scheme)
        for leaf, array in stored.items():
            found[f"{name}|{leaf}"] = plain(array)
        found[f"{name}|decoded"] = plain(compressor.decompress(stored, scheme)["weight"])
    np.savez_compressed(Path(__file__).with_name("compressed.npz"), **found)


if __name__ == "__main__":
    main()
