# SPDX-License-Identifier: Apache-2.0
"""Faults to plant in good checkpoints: in their descriptions and files, in fused linears, and in
the layouts of others.
"""

import numpy as np
from damage import add, change
from planted import (
    DOWN,
    SECOND,
    UP,
    Fault,
    Q,
    bf16,
    misplaced,
    missing_shard,
    no_group,
    other_group,
    renamed,
    second_shard,
    stale,
)
from served import (
    BF16,
    CONFIG,
    HF_QUANT,
    change_all,
    cut,
    ignoring,
    indexed,
    inline,
    said,
    saying,
    without,
)

OTHER_FAULTS = {
    # descriptions
    "the two disagree": Fault(
        "nvfp4", saying(quant_algo="FP8"), "descriptions-agree", "quant_algo NVFP4"
    ),
    "the two lists disagree": Fault(
        "nvfp4", saying(ignore=["lm_head"]), "descriptions-agree", "model.embed_tokens"
    ),
    "the two caches disagree": Fault(
        "fp8", saying(kv_cache_scheme=None), "descriptions-agree", "KV cache FP8"
    ),
    "no second description": Fault(
        "nvfp4", without(HF_QUANT), "description-file", HF_QUANT, "trtllm"
    ),
    "no configuration": Fault("nvfp4", without(CONFIG), "config", CONFIG),
    "configuration cut": Fault(
        "nvfp4", lambda f: (f / CONFIG).write_text('{"model_type": "lla'), "config", CONFIG
    ),
    "group_size": Fault(
        "nvfp4",
        lambda f: (saying(config_groups=None)(f), said(group_size=32)(f)),
        "group-size",
        "a scale for 16 columns, the descriptions say 32",
    ),
    "dtype of no name": Fault(
        "nvfp4",
        lambda f: (f / CONFIG).write_text(
            (f / CONFIG).read_text().replace('"bfloat16"', '"float17"')
        ),
        "model-dtype",
        "float17",
    ),
    "another dtype of the model": Fault(
        "nvfp4",
        lambda f: (f / CONFIG).write_text(
            (f / CONFIG).read_text().replace('"bfloat16"', '"float16"')
        ),
        "model-dtype",
        "float16",
        "warnings",
    ),
    "a layer that is none": Fault(
        "mixed",
        lambda f: inline(
            f,
            lambda q: q["quantized_layers"].update({f"{UP}s": {"quant_algo": "FP8"}}),
        ),
        "described",
        f"{UP}s",
    ),
    # files
    "stale index": Fault("nvfp4", stale, "shard", "b.safetensors is missing"),
    "a file beside the index": Fault("nvfp4", stale, "index-extra", "model.saf", "warnings"),
    "index with a tensor of before": Fault(
        "sharded", indexed(renamed), "index", f"{UP}.weight_gone, and no file does"
    ),
    "index with a tensor elsewhere": Fault("sharded", indexed(misplaced), "index", "and model-0"),
    "index names a file that is missing": Fault(
        "sharded", indexed(missing_shard), "shard", "model-00099-of-00099.safetensors is missing"
    ),
    "wrong total_size": Fault(
        "sharded",
        indexed(lambda found: found["metadata"].update(total_size=1)),
        "index-size",
        "total_size 1",
    ),
    "missing file": Fault("sharded", second_shard, "shard", SECOND),
    "truncated file": Fault("nvfp4", cut, "shard", "is truncated"),
    "half-copied shard": Fault("sharded", cut, "shard", "is truncated"),
    "no tokenizer": Fault("nvfp4", without("tokenizer.json"), "tokenizer", "no tokenizer"),
    # fused linears
    "unequal tensor scales": Fault(
        "nvfp4",
        change(f"{Q}.weight_scale_2", lambda a: a * 2),
        "fused-scales",
        f"{Q}.weight_scale_2",
        "vllm",
    ),
    "unequal input scales": Fault(
        "nvfp4",
        change(f"{Q}.input_scale", lambda a: a * 2),
        "fused-scales",
        "asserts that they are equal",
        "trtllm",
    ),
    "formats mixed in one matrix": Fault(
        "nvfp4",
        lambda f: [bf16(Q)(f), ignoring("lm_head", "model.embed_tokens", Q)(f)],
        "fused-formats",
        Q,
        "trtllm",
    ),
    "columns": Fault(
        "moe",
        lambda f: (
            said(quant_algo="FP8_PB_WO")(f),
            change_all(".experts.", lambda a: None)(f),
            change_all("input_scale", lambda a: None)(f),
            change_all("weight_scale", lambda a: np.ones((1, 1, 1, 1), np.float32))(f),
        ),
        "columns",
        "64 columns, no multiple of 128",
        "vllm",
    ),
    # what an engine does not know
    "biases of keys": Fault("affine", lambda f: None, "unread-tensor", "k_bias", "vllm"),
    "names in small letters": Fault(
        "nvfp4", said(quant_algo="nvfp4"), "capitals", "nvfp4", "sglang"
    ),
    "factors of inputs": Fault(
        "nvfp4",
        lambda f: (
            said(quant_algo="NVFP4_AWQ")(f),
            add(f"{DOWN}.pre_quant_scale", np.ones(256, BF16))(f),
        ),
        "accepts",
        "NVFP4_AWQ",
        "vllm",
    ),
    "no factors of inputs": Fault(
        "int4", lambda f: None, "needed-tensor", "mlp.down_proj.pre_quant_scale", "trtllm"
    ),
    "blocks of 32": Fault(
        "nvfp4",
        lambda f: (
            said(group_size=32)(f),
            inline(f, lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=32)),
            change_all("weight_scale", lambda a: a[:, ::2].copy() if a.ndim == 2 else a)(f),
        ),
        "block-size",
        "32 columns to a scale",
        "vllm",
    ),
    # compressed-tensors
    "no stored shape": Fault(
        "ct-int4", change(f"{UP}.weight_shape", None), "missing-tensor", f"{UP}.weight_shape"
    ),
    "another stored shape": Fault(
        "ct-int4", change(f"{UP}.weight_shape", lambda a: a[::-1].copy()), "matrix-shape", UP
    ),
    "codes of another width": Fault(
        "ct-int4", change(f"{UP}.weight_packed", lambda a: a[:, 1:].copy()), "shape", UP
    ),
    "no global scale": Fault(
        "ct-nvfp4",
        change(f"{UP}.weight_global_scale", None),
        "missing-tensor",
        f"{UP}.weight_global_scale",
    ),
    "no config group": Fault(
        "ct-nvfp4", lambda f: inline(f, no_group), "description", "has no config_groups"
    ),
    "a group for one linear": Fault("ct-nvfp4", lambda f: inline(f, other_group), "excluded", UP),
    "ignored and quantized": Fault(
        "ct-nvfp4", saying(ignore=["lm_head", "model.embed_tokens", UP]), "excluded", UP
    ),
    "unequal global scales": Fault(
        "ct-nvfp4",
        change(f"{Q}.weight_global_scale", lambda a: a * 2),
        "fused-scales",
        f"{Q}.weight_global_scale",
        "vllm",
    ),
    "unequal scales of tensors": Fault(
        "ct-fp8",
        change(f"{Q}.weight_scale", lambda a: a * 2),
        "fused-scales",
        f"{Q}.weight_scale",
        "vllm",
    ),
    # AutoAWQ and GPTQ
    "AWQ without zero points": Fault(
        "awq", change(f"{UP}.qzeros", None), "missing-tensor", f"{UP}.qzeros"
    ),
    "AWQ packed along the other axis": Fault(
        "awq",
        change(f"{DOWN}.qzeros", lambda a: a.T.copy()),
        "shape",
        f"{DOWN}.qzeros",
    ),
    "AWQ scales of another group": Fault(
        "awq",
        change(f"{DOWN}.scales", lambda a: a[::2].copy()),
        "group-size",
        f"{DOWN}.scales has a scale for 64 columns",
    ),
    "AWQ without a key": Fault("awq", saying(zero_point=None), "keys", "zero_point", "vllm"),
    "GPTQ without zero points": Fault(
        "gptq", change(f"{UP}.qzeros", None), "missing-tensor", f"{UP}.qzeros"
    ),
    "GPTQ packed wrong": Fault(
        "gptq", change(f"{UP}.scales", lambda a: a[:, 1:].copy()), "shape", f"{UP}.scales"
    ),
    "GPTQ codes of another dtype": Fault(
        "gptq",
        change(f"{UP}.qweight", lambda a: a.view(np.uint32)),
        "dtype",
        f"{UP}.qweight is U32",
    ),
    "GPTQ that is not symmetric": Fault("gptq", saying(sym=False), "accepts", "W4A16_ASYM", "vllm"),
}
