# SPDX-License-Identifier: Apache-2.0
"""Faults to plant in good checkpoints: in their tensors, their scales, and what is left alone."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from checkpoints import write
from damage import add, arrays, change, number
from served import (
    BF16,
    INDEX,
    Damage,
    change_all,
    ignoring,
    said,
    saying,
)

UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
EXPERT = "model.layers.1.mlp.experts.2.up_proj"
SECOND = "model-00002-of-"


class Fault(NamedTuple):
    """`base`: the good checkpoint; `of`: whose finding it is, an engine's or the checkpoint's own
    ("faults", "warnings"); `names`: what the text has.
    """

    base: str
    damage: Damage
    rule: str
    names: str
    of: str = "faults"


def scalar(value: float):
    return lambda array: np.full_like(array, value)


def first_shard(found: dict) -> str:
    return sorted(found["weight_map"].values())[0]


def renamed(found: dict) -> None:
    found["weight_map"][f"{UP}.weight_gone"] = first_shard(found)


def missing_shard(found: dict) -> None:
    found["weight_map"][f"{UP}.weight"] = "model-00099-of-00099.safetensors"


def misplaced(found: dict) -> None:
    first = first_shard(found)
    files = list(found["weight_map"].values())
    others = (n for n, file in found["weight_map"].items() if file != first)
    name = next(n for n in others if files.count(found["weight_map"][n]) > 1)
    found["weight_map"][name] = first


def second_shard(folder: Path) -> None:
    next(folder.glob(f"{SECOND}*")).unlink()


def stale(folder: Path) -> None:
    """The index of the original lies beside the one file of the export."""
    (folder / INDEX).write_text('{"metadata": {}, "weight_map": {"a": "b.safetensors"}}')


def bf16(path: str):
    """A linear left as it was."""

    def damage(folder: Path) -> None:
        found = {n: a for n, a in arrays(folder).items() if not n.startswith(f"{path}.")}
        shape = arrays(folder)[f"{path}.weight"].shape
        write(folder, found | {f"{path}.weight": np.ones(shape, BF16)})

    return damage


def no_group(found: dict) -> None:
    found["config_groups"] = {}


def other_group(found: dict) -> None:
    found["config_groups"]["group_0"]["targets"] = [Q]


TENSOR_FAULTS = {
    # tensors
    "missing tensor scale": Fault(
        "nvfp4", change(f"{UP}.weight_scale_2", None), "missing-tensor", f"{UP}.weight_scale_2"
    ),
    "missing input scale": Fault(
        "nvfp4", change(f"{DOWN}.input_scale", None), "input-scale", f"{DOWN}.input_scale"
    ),
    "missing codes": Fault(
        "nvfp4", change(f"{DOWN}.weight", None), "missing-tensor", f"{DOWN}.weight"
    ),
    "missing norm": Fault(
        "nvfp4", change("model.norm.weight", None), "missing-tensor", "model.norm.weight"
    ),
    "block scales transposed": Fault(
        "nvfp4", change(f"{DOWN}.weight_scale", lambda a: a.T.copy()), "shape", f"{DOWN}.weight_s"
    ),
    "codes cut": Fault(
        "nvfp4", change(f"{UP}.weight", lambda a: a[:-2].copy()), "shape", f"{UP}.weight"
    ),
    "codes of another dtype": Fault(
        "nvfp4", change(f"{UP}.weight", lambda a: a.view(np.int8)), "dtype", f"{UP}.weight is I8"
    ),
    "scales of another dtype": Fault(
        "nvfp4",
        change(f"{UP}.weight_scale", lambda a: a.astype(np.float32)),
        "dtype",
        f"{UP}.weight_scale is F32",
    ),
    "tensor scale of another dtype": Fault(
        "fp8", change(f"{UP}.weight_scale", lambda a: a.astype(BF16)), "dtype", f"{UP}.weight_sc"
    ),
    "norm of another dtype": Fault(
        "nvfp4",
        change("model.norm.weight", lambda a: a.astype(np.int32)),
        "dtype",
        "model.norm.weight is I32",
    ),
    "unknown leaf": Fault(
        "nvfp4", add(f"{UP}.zero_point", np.ones(3, np.int8)), "unknown-tensor", f"{UP}.zero_point"
    ),
    "unknown tensor": Fault(
        "nvfp4", add("model.extra.bias", np.ones(3, BF16)), "unknown-tensor", "model.extra.bias"
    ),
    "k_scale alone": Fault(
        "fp8",
        change(K.replace("k_proj", "v_proj") + ".v_scale", None),
        "kv-pair",
        f"{K}.k_scale",
    ),
    "scales of a cache nobody mentions": Fault(
        "fp8",
        said(kv_cache_scheme=None, kv_cache_quant_algo=None),
        "kv-described",
        "k_scale",
        "warnings",
    ),
    # numbers
    "zero": Fault(
        "nvfp4", change(f"{UP}.weight_scale_2", scalar(0)), "scale-numbers", f"{UP}.weight_scale_2"
    ),
    "infinite": Fault(
        "nvfp4", change(f"{UP}.input_scale", scalar(np.inf)), "scale-numbers", "it is infinite"
    ),
    "NaN": Fault("fp8", change(f"{UP}.weight_scale", scalar(np.nan)), "scale-numbers", "it is NaN"),
    "negative": Fault(
        "int4", change(f"{UP}.weight_scale", lambda a: -a), "scale-numbers", f"{UP}.weight_scale"
    ),
    "one block scale NaN": Fault(
        "nvfp4",
        change(f"{UP}.weight_scale", number(3, 0x7F)),
        "scale-numbers",
        f"{UP}.weight_scale: 1 of 2048 are NaN",
    ),
    "one block scale negative": Fault(
        "nvfp4", change(f"{UP}.weight_scale", number(3, 0x81)), "scale-numbers", "are negative"
    ),
    "all block scales zero": Fault(
        "nvfp4", change(f"{UP}.weight_scale", scalar(0)), "scale-numbers", "all are zero"
    ),
    "one power of two NaN": Fault(
        "mxfp8", change(f"{UP}.weight_scale", number(3, 255)), "scale-numbers", "1 of 1024 are NaN"
    ),
    "absurd": Fault(
        "nvfp4",
        change(f"{UP}.weight_scale_2", scalar(1e30)),
        "scale-magnitude",
        f"{UP}.weight_scale_2",
        "warnings",
    ),
    "absurdly small": Fault(
        "fp8",
        change(f"{UP}.weight_scale", scalar(1e-30)),
        "scale-magnitude",
        f"{UP}.weight_scale",
        "warnings",
    ),
    "absurd power of two": Fault(
        "mxfp8",
        change(f"{UP}.weight_scale", number(3, 250)),
        "scale-magnitude",
        "2^123",
        "warnings",
    ),
    # what is left alone
    "quantized and listed": Fault(
        "nvfp4", ignoring("lm_head", "model.embed_tokens", UP), "excluded", f"{UP}.weight_scale"
    ),
    "not quantized and not listed": Fault(
        "nvfp4", ignoring("model.embed_tokens"), "unlisted", "lm_head is stored as BF16"
    ),
    "nothing describes it": Fault(
        "awq", saying(quant_method=None, bits=None), "description", "quant_algo"
    ),
    "a layer too many by substring": Fault(
        "nvfp4",
        ignoring("lm_head", "model.embed_tokens", "layers.1"),
        "ignored",
        "layers.1",
        "vllm",
    ),
    "globs on the linears of a fused one": Fault(
        "nvfp4",
        lambda f: [
            *(bf16(Q.replace("q_proj", f"{name}_proj"))(f) for name in "qkv"),
            ignoring("lm_head", "model.embed_tokens", *(f"{Q[:-6]}{x}_proj*" for x in "qkv"))(f),
        ],
        "ignored",
        "model.layers.0.self_attn.qkv_proj is not quantized",
        "sglang",
    ),
    "one linear of a fused one": Fault(
        "nvfp4",
        lambda f: [bf16(Q)(f), ignoring("lm_head", "model.embed_tokens", Q)(f)],
        "ignored",
        "model.layers.0.self_attn.qkv_proj: vLLM 0.32 finds some",
        "vllm",
    ),
    "expert left as it was": Fault("moe", bf16(EXPERT), "experts", EXPERT),
    "no expert quantized": Fault(
        "moe",
        change_all(".experts.", lambda a: None if a.ndim == 0 else a.astype(BF16)),
        "experts",
        "no up_proj of model.layers.0.mlp.experts is quantized",
    ),
    "stacked experts left as they were": Fault(
        "moe",
        add("model.layers.0.mlp.experts.gate_up_proj", np.ones((4, 8, 8), BF16)),
        "experts",
        "model.layers.0.mlp.experts.gate_up_proj",
    ),
    "one expert of mixtral": Fault(
        "mixtral",
        bf16("model.layers.0.block_sparse_moe.experts.1.w2"),
        "experts",
        "block_sparse_moe.experts.1.w2",
    ),
}
