# SPDX-License-Identifier: Apache-2.0
"""How far the outputs of stored linears are off on recorded inputs, read from the files alone."""

from pathlib import Path

import exports
import ml_dtypes
import numpy as np
import reference

KINDS = {
    "F32": np.dtype("f4"),
    "I32": np.dtype("i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}

NORMS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "input_layernorm"),
    **dict.fromkeys(("gate_proj", "up_proj"), "post_attention_layernorm"),
}
Arrays = dict[str, np.ndarray]


def read(folder: Path) -> Arrays:
    """Everything in the safetensors files of a folder."""
    return {
        name: np.frombuffer(raw, KINDS[dtype]).reshape(shape)
        for name, (dtype, shape, raw) in exports.read_tensors(folder).items()
    }


def decoded(found: Arrays, path: str) -> np.ndarray:
    """The float32 weight that the stored arrays of one linear stand for."""
    codes, scale = found[f"{path}.weight"], found.get(f"{path}.weight_scale")
    if scale is None:
        return codes.astype(np.float32)
    if scale.dtype == np.uint8:  # powers of two
        scale = np.exp2(scale.astype(np.float32) - 127)
        if codes.dtype == np.uint8:
            pairs = np.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1)
            codes = reference.value("e2m1", pairs)
        return codes.astype(np.float32) * np.repeat(scale, codes.shape[1] // scale.shape[1], 1)
    if scale.ndim == 4:  # of squares
        tall, wide = codes.shape[0] // scale.shape[0], codes.shape[1] // scale.shape[2]
        return codes.astype(np.float32) * scale[:, 0, :, 0].repeat(tall, 0).repeat(wide, 1)
    if codes.dtype == np.uint8 and scale.dtype == np.float32:  # int4: two rows a byte
        pairs = np.stack([codes & 15, codes >> 4], 1).reshape(-1, codes.shape[1])
        steps = np.repeat(scale, pairs.shape[1] // scale.shape[1], 1)
        return reference.value("int4", pairs) * steps
    if codes.dtype == np.uint8:  # two columns a byte
        pairs = np.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1)
        steps = np.repeat(scale.astype(np.float32), pairs.shape[1] // scale.shape[1], 1)
        return reference.value("e2m1", pairs) * (steps * found[f"{path}.weight_scale_2"])
    return codes.astype(np.float32) * (scale[:, None] if scale.ndim else scale)


def output_errors(base: Arrays, found: Arrays, acts: Arrays) -> dict[str, float]:
    """Linear -> |X p W'^T - X W^T|^2 / |X W^T|^2, where p is its pre_quant_scale, or what a norm
    took. Nothing is known here of rows that took a factor.
    """
    errors = {}
    for path in sorted({key.partition("|")[0] for key in acts}):
        w = base[f"{path}.weight"].astype(np.float32)
        rows = [x for key, x in acts.items() if key.startswith(f"{path}|")]
        x = np.concatenate([x.reshape(-1, x.shape[-1]) for x in rows]).astype(np.float32)
        near = decoded(found, path)
        if (inner := f"{path}.weight_quantizer._svdquant_lora_a") in found:
            outer = found[inner.replace("lora_a", "lora_b")].astype(np.float32)
            near = near + outer @ found[inner].astype(np.float32)
        wanted, got = x @ w.T, (x * _factor(base, found, path)) @ near.T
        errors[path] = float(np.square(got - wanted).sum() / np.square(wanted).sum())
    return errors


def _factor(base: Arrays, found: Arrays, path: str) -> np.ndarray:
    """What the inputs of a linear are multiplied by."""
    parent, name = path.split(".")[:3], path.split(".")[-1]
    if (kept := f"{path}.pre_quant_scale") in found:
        return found[kept].astype(np.float32)
    if name not in NORMS:
        return np.ones(1, np.float32)
    gain = ".".join((*parent, NORMS[name], "weight"))
    return found[gain].astype(np.float32) / base[gain].astype(np.float32)
