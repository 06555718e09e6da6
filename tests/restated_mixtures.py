# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts that transformers has not, or has otherwise than they were published, written
down again: slow NumPy in float64, one sequence, one head and one token at a time.

Sources: the modeling files that the checkpoints bring along (DBRX, Snowflake Arctic, DeepSeek-V2),
and their papers.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from restated import (
    Checkpoint,
    Config,
    Tensors,
    attended,
    frequencies,
    side_by_side,
    silu,
    turned,
    turned_neighbours,
)


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max())
    return p / p.sum()


def glu(ck: Checkpoint, names: Sequence[str], x: np.ndarray) -> np.ndarray:
    gate, up, down = names
    return ck.linear(down, silu(ck.linear(gate, x)) * ck.linear(up, x))


def grouped(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: tuple[int, int, int], theta: float
) -> np.ndarray:
    """Attention of flat queries, keys and values, heads side by side."""
    queries, keys, size = heads
    turn, outs = frequencies(theta, size), []
    for n in range(queries):
        g = n // (queries // keys)
        qn, kn, vn = (z[:, i * size :][:, :size] for z, i in ((q, n), (k, g), (v, g)))
        outs.append(attended(turned(qn, turn), turned(kn, turn), vn, size**-0.5))
    return side_by_side(outs)


def dbrx(c: Config, tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    ck, attn, ffn = Checkpoint(tensors), c["attn_config"], c["ffn_config"]
    heads, groups = c["n_heads"], attn["kv_n_heads"]
    size, inner, experts = c["d_model"] // heads, ffn["ffn_hidden_size"], ffn["moe_num_experts"]
    power = ffn.get("moe_normalize_expert_weights", 1.0)

    def normed(ck: Checkpoint, name: str, x: np.ndarray) -> np.ndarray:
        y = x - np.mean(x, axis=-1, keepdims=True)
        return y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-5) * ck[f"{name}.weight"]

    h = ck["transformer.wte.weight"][ids]
    for i in range(c["n_layers"]):
        at = ck.at(f"transformer.blocks.{i}.")
        inside = at.at("norm_attn_norm.")
        y = inside.linear("attn.Wqkv", normed(inside, "norm_1", h))
        if attn.get("clip_qkv") is not None:
            y = np.clip(y, -attn["clip_qkv"], attn["clip_qkv"])
        q, k, v = np.split(y, [heads * size, (heads + groups) * size], axis=1)
        y = grouped(q, k, v, (heads, groups, size), attn["rope_theta"])
        h = h + inside.linear("attn.out_proj", y)
        x = normed(inside, "norm_2", h)
        w1, v1, w2 = (
            at[f"ffn.experts.mlp.{name}"].reshape(experts, inner, -1) for name in ("w1", "v1", "w2")
        )
        out = np.zeros_like(h)
        for t, row in enumerate(x):
            p = softmax(at["ffn.router.layer.weight"] @ row)
            best = np.argsort(-p)[: ffn["moe_top_k"]]
            total = 1 if power is None else np.sum(p[best] ** power) ** (1 / power)
            for e in best:
                y = (silu(w1[e] @ row) * (v1[e] @ row)) @ w2[e]
                out[t] += p[e] / total * y
        h = h + out
    return ck.linear("lm_head", normed(ck, "transformer.norm_f", h))


def arctic(c: Config, tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    ck, eps = Checkpoint(tensors), c["rms_norm_eps"]
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    shape, k = (heads, groups, c["hidden_size"] // heads), c["num_experts_per_tok"]

    def mixed(at: Checkpoint, x: np.ndarray) -> np.ndarray:
        out = np.zeros_like(x)
        for t, row in enumerate(x):
            p = softmax(at["block_sparse_moe.gate.weight"] @ row)
            best = np.argsort(-p)[:k]
            for e in best:
                expert = at.at(f"block_sparse_moe.experts.{e}.")
                out[t] += p[e] / (p[best].sum() if k > 1 else 1) * glu(expert, W, row)
        return out

    h = ck["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        at = ck.at(f"model.layers.{i}.")
        x = at.rms("input_layernorm", h, eps)
        q, key, v = (at.linear(f"self_attn.{letter}_proj", x) for letter in "qkv")
        a = h + at.linear("self_attn.o_proj", grouped(q, key, v, shape, c["rope_theta"]))
        sparse = (i + 1) % c["moe_layer_frequency"] == 0
        if sparse and c["use_residual"]:
            small = glu(at.at("residual_mlp."), W, at.rms("residual_layernorm", a, eps))
            h = a + small + mixed(at, at.rms("post_attention_layernorm", h, eps))
        else:
            x = at.rms("post_attention_layernorm", a, eps)
            h = a + (mixed(at, x) if sparse else glu(at.at("block_sparse_moe.mlp."), W, x))
    return ck.linear("lm_head", ck.rms("model.norm", h, eps))


W = ("w1", "w3", "w2")
PLAIN = ("gate_proj", "up_proj", "down_proj")


def yarn(theta: float, d: int, scaling: Config) -> np.ndarray:
    factor, trained = scaling["factor"], scaling["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return d * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling["beta_fast"])), 0)
    high = min(math.ceil(dimension(scaling["beta_slow"])), d - 1)
    part = np.clip((np.arange(d // 2) - low) / (high - low or 0.001), 0, 1)
    f = frequencies(theta, d)
    return f / factor * part + f * (1 - part)


def chosen(c: Config, at: Checkpoint, row: np.ndarray) -> dict[int, float]:
    """The experts of a token and their weights: by softmax and the best of groups, or by sigmoid
    with a correction and the two best of groups.
    """
    logits, third = at["mlp.gate.weight"] @ row, c["model_type"] != "deepseek_v2"
    p = 1 / (1 + np.exp(-logits)) if third else softmax(logits)
    scores = p + at["mlp.gate.e_score_correction_bias"] if third else p
    groups = np.sort(scores.reshape(c["n_group"], -1))
    best = np.argsort(-groups[:, -2 if third else -1 :].sum(1))[: c["topk_group"]]
    size = len(p) // c["n_group"]
    allowed = [e for e in range(len(p)) if e // size in best]
    found = sorted(allowed, key=lambda e: -scores[e])[: c["num_experts_per_tok"]]
    total = sum(p[e] for e in found) if third else 1
    return {e: p[e] / total * c["routed_scaling_factor"] for e in found}


def deepseek(c: Config, tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    """With the scale of scores that transformers leaves out of the second version."""
    ck, eps, heads = Checkpoint(tensors), c["rms_norm_eps"], c["num_attention_heads"]
    still, turning, latent = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["kv_lora_rank"]
    scaling, size = c["rope_scaling"], c["v_head_dim"]
    turn = yarn(c["rope_theta"], turning, scaling)

    def grown(by: float) -> float:
        return 0.1 * by * math.log(scaling["factor"]) + 1

    length = grown(scaling["mscale"]) / grown(scaling["mscale_all_dim"])
    scale = (still + turning) ** -0.5 * grown(scaling["mscale_all_dim"]) ** 2

    def rotated(x: np.ndarray) -> np.ndarray:
        return length * turned_neighbours(x, turn)

    h = ck["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        at = ck.at(f"model.layers.{i}.")
        own = at.at("self_attn.")
        x = at.rms("input_layernorm", h, eps)
        q = own.linear("q_b_proj", own.rms("q_a_layernorm", own.linear("q_a_proj", x), 1e-6))
        few = own.linear("kv_a_proj_with_mqa", x)
        kv = own.linear("kv_b_proj", own.rms("kv_a_layernorm", few[:, :latent], 1e-6))
        outs = []
        for qn, kvn in zip(np.split(q, heads, axis=1), np.split(kv, heads, axis=1), strict=True):
            qn = side_by_side([qn[:, :still], rotated(qn[:, still:])])
            kn = side_by_side([kvn[:, :still], rotated(few[:, latent:])])
            assert kvn.shape[1] == still + size
            outs.append(attended(qn, kn, kvn[:, still:], scale))
        h = h + own.linear("o_proj", side_by_side(outs))
        x = at.rms("post_attention_layernorm", h, eps)
        if i < c["first_k_dense_replace"]:
            h = h + glu(at.at("mlp."), PLAIN, x)
            continue
        out = glu(at.at("mlp.shared_experts."), PLAIN, x)
        for t, row in enumerate(x):
            for e, weight in chosen(c, at, row).items():
                out[t] += weight * glu(at.at(f"mlp.experts.{e}."), PLAIN, row)
        h = h + out
    return ck.linear("lm_head", ck.rms("model.norm", h, eps))


_DBRX = {
    "model_type": "dbrx",
    "vocab_size": 40,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.8, "rope_theta": 100.0},
}
_FFN = {"ffn_hidden_size": 24, "ffn_act_fn": {"name": "silu"}, "moe_num_experts": 5, "moe_top_k": 3}
_ARCTIC = {
    "model_type": "arctic",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-3,
    "rope_theta": 100.0,
}
_DEEPSEEK = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-3,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "n_group": 4,
    "topk_group": 2,
    "rope_theta": 100.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 8,
    },
}

CASES: dict[str, dict] = {
    "dbrx": _DBRX | {"ffn_config": _FFN | {"moe_normalize_expert_weights": 1.0}},
    "dbrx_second_power": _DBRX | {"ffn_config": _FFN | {"moe_normalize_expert_weights": 2.0}},
    "dbrx_unnormed": _DBRX
    | {
        "attn_config": {"kv_n_heads": 1, "rope_theta": 100.0},
        "ffn_config": _FFN | {"moe_normalize_expert_weights": None},
    },
    "arctic": _ARCTIC
    | {"moe_layer_frequency": 1, "use_residual": True, "parallel_attn_mlp_res": True},
    "arctic_every_other": _ARCTIC
    | {
        "moe_layer_frequency": 2,
        "num_hidden_layers": 4,
        "use_residual": True,
        "parallel_attn_mlp_res": True,
    },
    "arctic_serial": _ARCTIC
    | {"moe_layer_frequency": 2, "use_residual": False, "num_experts_per_tok": 1},
    "deepseek_v2_long": _DEEPSEEK
    | {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy"},
    "kimi_k2": _DEEPSEEK | {"model_type": "kimi_k2", "norm_topk_prob": True},
}
"""Name -> config.json."""

FUNCTIONS: dict[str, Callable[[Config, Tensors, np.ndarray], np.ndarray]] = {
    "dbrx": dbrx,
    "arctic": arctic,
    "deepseek_v2": deepseek,
    "kimi_k2": deepseek,
}
"""model_type -> logits of a sequence."""
