# SPDX-License-Identifier: Apache-2.0
"""Logits of ModelOpt's fake-quantized tiny models: `python tests/golden/make_logits.py` writes
logits.npz beside this file, the last LAST of every text in the first batch of calibration ids.

The scales that an export shares are shared first, and weights are rounded in their own dtype, both
by ModelOpt itself. Then all is computed in float32: in bfloat16 the last bits of engines differ,
and with them codes of activations.

ModelOpt's rounding to FP8, INT8 and INT4 in bfloat16 gives other weights than its exports hold. For
these, KEY|stored are the logits with the weights of the export, and inputs, keys and values rounded
by ModelOpt.

Made with nvidia-modelopt 0.47.0, torch 2.13.0 (CPU) and transformers 5.14.1. ModelOpt rounds to
blocks with scales of eight bits on GPUs alone; here its classes of stored tensors take that place,
each input decoded from what they encode it to.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import make_exports
import modelopt.torch.quantization as mtq
import numpy as np
import torch
from make_exports import exports
from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from safetensors.torch import load_file

LOGITS = Path(__file__).with_name("logits.npz")
BOUND = 6.0 * 448.0
LAST = 4


def nvfp4(x: torch.Tensor, size: int, amax: torch.Tensor) -> torch.Tensor:
    stored, scale, outer = NVFP4QTensor.quantize(
        x, size, weights_scaling_factor_2=amax.float().amax() / BOUND
    )
    how = {"scale": scale, "double_scale": outer, "block_sizes": {-1: size}}
    return stored.dequantize(torch.float32, **how)


def mxfp4(x: torch.Tensor, size: int, amax: object) -> torch.Tensor:
    stored, scale = MXFP4QTensor.quantize(x, size)
    return stored.dequantize(torch.float32, scale=scale, block_sizes={-1: size})


def mxfp8(x: torch.Tensor, size: int, amax: object) -> torch.Tensor:
    stored, scale = MXFP8QTensor.quantize(x)
    return stored.dequantize(torch.float32, scale=scale)


BY_BITS = {(4, 2, 8, 4): nvfp4, (4, 2, 9, 8): mxfp4, (8, 4, 9, 8): mxfp8}
"""Bits of the element, of its exponent, of the scale (with a sign), of its exponent -> function."""


def rounded(x, size, amax, *bits):
    flat = x.reshape(-1, x.shape[-1])
    return BY_BITS[bits](flat, size, amax).reshape(x.shape).to(x.dtype)


def quantized(folder: Path, row: exports.Export) -> torch.nn.Module:
    """Of the checkpoint in `folder`, with scales as in an export."""
    net = make_exports.load(folder, row.model)
    ids = torch.from_numpy(exports.token_ids(row.model))
    mtq.quantize(net, make_exports.quant_config(row), lambda m: [m(batch) for batch in ids])
    requantize_resmooth_fused_llm_layers(net)
    return net


def logits(net: torch.nn.Module, model: str) -> np.ndarray:
    ids = torch.from_numpy(exports.token_ids(model))
    with torch.inference_mode():
        return net.float()(ids[0]).logits[:, -LAST:].numpy()


def with_stored_weights(net: torch.nn.Module, folder: Path) -> bool:
    """Put the weights of an export in FP8, INT8 or INT4 in the place of those of `net`; whether
    there were any.
    """
    stored, any_found = {}, False
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    for name, module in net.named_modules():
        codes, scale = stored.get(f"{name}.weight"), stored.get(f"{name}.weight_scale")
        if scale is None or scale.dtype not in (torch.float32, torch.bfloat16):
            continue
        if codes.dtype == torch.uint8:  # INT4: even rows are the low halves of bytes
            low = torch.stack([codes & 15, codes >> 4], 1).reshape(-1, codes.shape[1])
            codes = ((low ^ 8).to(torch.int8) - 8).reshape(low.shape[0], scale.shape[1], -1)
            scale = scale[..., None]
        elif scale.ndim == 1:
            scale = scale[:, None]
        w = codes.float() * scale.float()
        module.weight.data = w.reshape(module.weight.shape).to(module.weight.dtype)
        module.weight_quantizer.disable()
        any_found = True
    return any_found


def main() -> None:
    torch.set_num_threads(1)
    tensor_quant.dynamic_block_quantize_op = rounded
    found = {}
    with TemporaryDirectory() as root:
        for model in exports.BATCHES:
            make_exports.make_base(folder := Path(root) / model, model)
            found[model] = logits(make_exports.load(folder, model), model)
            rows = (row for row in exports.EXPORTS if row.model == model)
            for row in (row for row in rows if row.shard == exports.Export.shard):
                print(row.key, flush=True)
                net = quantized(folder, row)
                mtq.fold_weight(net)
                found[row.key] = logits(net, model)
                make_exports.export(folder, out := Path(root) / row.key, row)
                if with_stored_weights(net := quantized(folder, row), out):
                    mtq.fold_weight(net)
                    found[f"{row.key}|stored"] = logits(net, model)
    np.savez_compressed(LOGITS, **found)


if __name__ == "__main__":
    main()
