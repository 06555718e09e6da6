# SPDX-License-Identifier: Apache-2.0
"""Decoders that transformers has not, written down again from their published architectures: slow
NumPy in float64, one sequence and one head at a time.

Sources: the modeling files that the checkpoints bring along (Qwen-7B, Baichuan and Baichuan2,
ChatGLM2 and 3, InternLM2, EXAONE 3, Phi-3-small, Nemotron Super), and their papers.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

Tensors = Mapping[str, np.ndarray]
Config = Mapping


class Checkpoint:
    """Tensors under a prefix, in float64."""

    def __init__(self, tensors: Tensors, prefix: str = ""):
        self.tensors, self.prefix = tensors, prefix

    def at(self, prefix: str) -> "Checkpoint":
        return Checkpoint(self.tensors, self.prefix + prefix)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[self.prefix + name].astype(np.float64)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        y = x @ self[f"{name}.weight"].T
        bias = f"{name}.bias"
        return y + self[bias] if self.prefix + bias in self.tensors else y

    def rms(self, name: str, x: np.ndarray, eps: float) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * self[f"{name}.weight"]

    def layer(self, name: str, x: np.ndarray, eps: float) -> np.ndarray:
        y = x - np.mean(x, axis=-1, keepdims=True)
        y = y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + eps)
        return y * self[f"{name}.weight"] + self[f"{name}.bias"]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def turned(x: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """[t, d] with channel i and i + d/2 as the parts of a complex number that is turned."""
    half = x.shape[1] // 2
    angle = np.exp(1j * np.arange(len(x))[:, None] * frequencies[None])
    y = (x[:, :half] + 1j * x[:, half:]) * angle
    return np.concatenate([y.real, y.imag], axis=1)


def turned_neighbours(x: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """[t, d] with channels 2i and 2i + 1 as the parts of a complex number that is turned."""
    y = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * np.arange(len(x))[:, None] * frequencies)
    return np.stack([y.real, y.imag], axis=-1).reshape(x.shape)


def frequencies(theta: float, d: int) -> np.ndarray:
    return theta ** (-2 * np.arange(d // 2) / d)


def attended(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    slope: float = 0.0,
    seen: Callable[[int, int], bool] = lambda i, j: True,
) -> np.ndarray:
    """One head, one query at a time."""
    out = []
    for i in range(len(q)):
        keys = [j for j in range(i + 1) if seen(i, j)]
        scores = np.array([q[i] @ k[j] * scale + slope * (j - i) for j in keys])
        p = np.exp(scores - scores.max())
        out.append(p @ v[keys] / p.sum())
    return np.array(out)


def slopes(heads: int) -> list[float]:
    """Of alibi, by the recursion of its authors."""
    if math.log2(heads).is_integer():
        first = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return [first ** (i + 1) for i in range(heads)]
    near = 2 ** math.floor(math.log2(heads))
    return slopes(near) + slopes(2 * near)[0::2][: heads - near]


def side_by_side(heads: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(heads, axis=1)


def qwen(c: Config, tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    ck, eps, size = Checkpoint(tensors), c["layer_norm_epsilon"], c["kv_channels"]
    t, trained, heads = len(ids), c["seq_length"], c["num_attention_heads"]
    theta = c["rotary_emb_base"]
    if c["use_dynamic_ntk"]:
        steps = math.ceil(math.log2(t / trained) + 1)
        theta *= max(2**steps - 1, 1) ** (size / (size - 2))
    grown = np.ones((t, 1))
    if c["use_logn_attn"]:
        for p in range(trained, t):
            grown[p] = math.log(p + 1, trained)
    h = ck["transformer.wte.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        at = ck.at(f"transformer.h.{i}.")
        q, k, v = np.split(at.linear("attn.c_attn", at.rms("ln_1", h, eps)), 3, axis=1)
        outs = []
        for n in range(heads):
            mine = slice(n * size, (n + 1) * size)
            turn = frequencies(theta, size)
            qn, kn = turned(q[:, mine], turn) * grown, turned(k[:, mine], turn)
            outs.append(attended(qn, kn, v[:, mine], size**-0.5))
        h = h + at.linear("attn.c_proj", side_by_side(outs))
        x = at.rms("ln_2", h, eps)
        h = h + at.linear("mlp.c_proj", at.linear("mlp.w1", x) * silu(at.linear("mlp.w2", x)))
    return ck.linear("lm_head", ck.rms("transformer.ln_f", h, eps))


def baichuan(c: Config, tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    ck, eps, heads = Checkpoint(tensors), c["rms_norm_eps"], c["num_attention_heads"]
    size = c["hidden_size"] // heads
    rotary = c["architectures"] == ["BaiChuanForCausalLM"]
    h = ck["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        at = ck.at(f"model.layers.{i}.")
        y = at.linear("self_attn.W_pack", at.rms("input_layernorm", h, eps))
        q, k, v = y.reshape(len(ids), 3, heads, size).transpose(1, 2, 0, 3)
        outs = []
        for n in range(heads):
            if rotary:
                turn = frequencies(10000.0, size)
                outs.append(attended(turned(q[n], turn), turned(k[n], turn), v[n], size**-0.5))
            else:
                outs.append(attended(q[n], k[n], v[n], size**-0.5, slopes(heads)[n]))
        h = h + at.linear("self_attn.o_proj", side_by_side(outs))
        x = at.rms("post_attention_layernorm", h, eps)
        gate, up = at.linear("mlp.gate_proj", x), at.linear("mlp.up_proj", x)
        h = h + at.linear("mlp.down_proj", silu(gate) * up)
    h, head = ck.rms("model.norm", h, eps), ck["lm_head.weight"]
    if "z_loss_weight" in c:
        head = np.array([row / max(np.linalg.norm(row), 1e-12) for row in head])
    return h @ head.T


def chatglm(c: Config, tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    ck, eps, heads = Checkpoint(tensors), c["layernorm_epsilon"], c["num_attention_heads"]
    size, groups = c["kv_channels"], c.get("multi_query_group_num")
    h = ck["transformer.embedding.word_embeddings.weight"][ids]
    turn = frequencies(10000.0 * c.get("rope_ratio", 1), size // 2)

    def turn_half(x: np.ndarray) -> np.ndarray:
        half = size // 2
        return np.concatenate([turned_neighbours(x[:, :half], turn), x[:, half:]], axis=1)

    for i in range(c["num_layers"]):
        at = ck.at(f"transformer.encoder.layers.{i}.")
        x = at.rms("input_layernorm", h, eps)
        base = x if c.get("apply_residual_connection_post_layernorm") else h
        y = at.linear("self_attention.query_key_value", x)
        if c.get("multi_query_attention"):
            q, k, v = np.split(y, [heads * size, (heads + groups) * size], axis=1)
            parts = [
                (q[:, n * size :][:, :size],)
                + tuple(z[:, n * groups // heads * size :][:, :size] for z in (k, v))
                for n in range(heads)
            ]
        else:
            parts = [np.split(z, 3, axis=1) for z in np.split(y, heads, axis=1)]
        outs = [attended(turn_half(q), turn_half(k), v, size**-0.5) for q, k, v in parts]
        h = base + at.linear("self_attention.dense", side_by_side(outs))
        x = at.rms("post_attention_layernorm", h, eps)
        base = x if c.get("apply_residual_connection_post_layernorm") else h
        gate, up = np.split(at.linear("mlp.dense_h_to_4h", x), 2, axis=1)
        h = base + at.linear("mlp.dense_4h_to_h", silu(gate) * up)
    if c.get("post_layer_norm", True):
        h = ck.rms("transformer.encoder.final_layernorm", h, eps)
    return ck.linear("transformer.output_layer", h)


def internlm2(c: Config, tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    ck, eps, heads = Checkpoint(tensors), c["rms_norm_eps"], c["num_attention_heads"]
    groups, size = c["num_key_value_heads"], c["hidden_size"] // heads
    theta, longest = c["rope_theta"], c["max_position_embeddings"]
    if c.get("rope_scaling") and len(ids) > longest:
        factor = c["rope_scaling"]["factor"]
        theta *= (factor * len(ids) / longest - (factor - 1)) ** (size / (size - 2))
    turn = frequencies(theta, size)
    h = ck["model.tok_embeddings.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        at = ck.at(f"model.layers.{i}.")
        y = at.linear("attention.wqkv", at.rms("attention_norm", h, eps))
        outs = []
        for group in np.split(y, groups, axis=1):
            *queries, k, v = np.split(group, heads // groups + 2, axis=1)
            k = turned(k, turn)
            outs += [attended(turned(q, turn), k, v, size**-0.5) for q in queries]
        h = h + at.linear("attention.wo", side_by_side(outs))
        x = at.rms("ffn_norm", h, eps)
        y = silu(at.linear("feed_forward.w1", x)) * at.linear("feed_forward.w3", x)
        h = h + at.linear("feed_forward.w2", y)
    return ck.linear("output", ck.rms("model.norm", h, eps))


def _llama3(theta: float, d: int, scaling: Config) -> np.ndarray:
    found = []
    for f in frequencies(theta, d):
        turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        part = min(max((turns - low) / (high - low), 0), 1)
        found.append(part * f + (1 - part) * f / scaling["factor"])
    return np.array(found)


def _grouped(
    ck: Checkpoint, names: tuple[str, str, str], x: np.ndarray, shape: tuple, turn: np.ndarray
) -> np.ndarray:
    heads, groups, size = shape
    q, k, v = (ck.linear(name, x) for name in names)
    outs = []
    for n in range(heads):
        g = n // (heads // groups)
        kn, vn = (z[:, g * size : (g + 1) * size] for z in (k, v))
        qn = q[:, n * size : (n + 1) * size]
        outs.append(attended(turned(qn, turn), turned(kn, turn), vn, size**-0.5))
    return side_by_side(outs)


def exaone(c: Config, tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    ck, eps, heads = Checkpoint(tensors), c["layer_norm_epsilon"], c["num_attention_heads"]
    size = c["hidden_size"] // heads
    turn = _llama3(c["rope_theta"], size, c["rope_scaling"])
    shape = (heads, c["num_key_value_heads"], size)
    h = ck["transformer.wte.weight"][ids]
    for i in range(c["num_layers"]):
        at = ck.at(f"transformer.h.{i}.")
        inner = at.at("attn.attention.")
        x = at.rms("ln_1", h, eps)
        y = _grouped(inner, ("q_proj", "k_proj", "v_proj"), x, shape, turn)
        h = h + inner.linear("out_proj", y)
        x = at.rms("ln_2", h, eps)
        h = h + at.linear(
            "mlp.c_proj", silu(at.linear("mlp.c_fc_0", x)) * at.linear("mlp.c_fc_1", x)
        )
    return ck.linear("lm_head", ck.rms("transformer.ln_f", h, eps))


def nemotron_nas(c: Config, tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    ck, eps, heads = Checkpoint(tensors), c["rms_norm_eps"], c["num_attention_heads"]
    size = c["hidden_size"] // heads
    turn = _llama3(c["rope_theta"], size, c["rope_scaling"])
    h = ck["model.embed_tokens.weight"][ids]
    for i, block in enumerate(c["block_configs"]):
        at = ck.at(f"model.layers.{i}.")
        attention, ffn = block["attention"], block["ffn"]
        if not attention["no_op"]:
            x = at.rms("input_layernorm", h, eps)
            if attention["replace_with_linear"]:
                h = h + at.linear("self_attn.linear_attn", x)
            else:
                shape = (heads, heads // attention["n_heads_in_group"], size)
                names = tuple(f"self_attn.{letter}_proj" for letter in "qkv")
                h = h + at.linear("self_attn.o_proj", _grouped(at, names, x, shape, turn))
        if not ffn["no_op"]:
            x = at.rms("post_attention_layernorm", h, eps)
            if ffn["replace_with_linear"]:
                h = h + at.linear("mlp.linear_mlp", x)
            else:
                inner = silu(at.linear("mlp.gate_proj", x)) * at.linear("mlp.up_proj", x)
                h = h + at.linear("mlp.down_proj", inner)
    return ck.linear("lm_head", ck.rms("model.norm", h, eps))


def phi3small(c: Config, tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    ck, eps, heads = Checkpoint(tensors), c["layer_norm_epsilon"], c["num_attention_heads"]
    groups, size = c["num_key_value_heads"], c["hidden_size"] // heads
    turn = frequencies(c["rope_embedding_base"], size)
    scale = c["mup_attn_multiplier"] / size if c["mup_use_scaling"] else size**-0.5
    embed = ck["model.embed_tokens.weight"]
    h = embed[ids] * c["mup_embedding_multiplier"]
    block, near = c["blocksparse_block_size"], c["blocksparse_num_local_blocks"]
    for i in range(c["num_hidden_layers"]):
        at = ck.at(f"model.layers.{i}.")
        dense = (i + 1) % c["dense_attention_every_n_layers"] == 0
        y = at.linear("self_attn.query_key_value", at.layer("input_layernorm", h, eps))
        outs = []
        for group in np.split(y, groups, axis=1):
            *queries, k, v = np.split(group, heads // groups + 2, axis=1)
            for q in queries:

                def seen(i: int, j: int, head: int = len(outs), dense: bool = dense) -> bool:
                    mine, other = i // block, j // block
                    strided = (other + head + 1) % c["blocksparse_vert_stride"] == 0
                    return dense or mine - other < near or strided

                outs.append(attended(turned(q, turn), turned(k, turn), v, scale, 0.0, seen))
        h = h + at.linear("self_attn.dense", side_by_side(outs))
        y = at.linear("mlp.up_proj", at.layer("post_attention_layernorm", h, eps))
        a = np.minimum(y[:, 0::2], c["gegelu_limit"])
        b = np.clip(y[:, 1::2], -c["gegelu_limit"], c["gegelu_limit"])
        h = h + at.linear("mlp.down_proj", a / (1 + np.exp(-1.702 * a)) * (b + 1))
    logits = ck.layer("model.final_layernorm", h, eps) @ embed.T / c["mup_width_multiplier"]
    logits[:, c["dummy_token_indices"]] = np.finfo(np.float32).min
    return logits


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
_QWEN = {
    "model_type": "qwen",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-3,
    "rotary_emb_base": 100.0,
    "rotary_pct": 1.0,
    "no_bias": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
}
_BAICHUAN = {
    "model_type": "baichuan",
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "rms_norm_eps": 1e-3,
    "model_max_length": 64,
}
_CHATGLM = {
    "model_type": "chatglm",
    "padded_vocab_size": 40,
    "hidden_size": 32,
    "ffn_hidden_size": 44,
    "num_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 12,
    "layernorm_epsilon": 1e-3,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "post_layer_norm": True,
    "original_rope": True,
    "seq_length": 64,
}
_SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _half(no_op: bool = False, linear: bool = False, **more: float) -> dict:
    return {"no_op": no_op, "replace_with_linear": linear, "sparsify": None, **more}


_BLOCKS = [
    {"attention": _half(n_heads_in_group=2), "ffn": _half(ffn_mult=1.0)},
    {"attention": _half(no_op=True), "ffn": _half(no_op=True)},
    {"attention": _half(linear=True), "ffn": _half(ffn_mult=14.0)},
    {"attention": _half(n_heads_in_group=4, window_length=None), "ffn": _half(linear=True)},
    {"attention": _half(no_op=True), "ffn": _half(ffn_mult=0.5)},
    {"attention": _half(n_heads_in_group=1), "ffn": _half(no_op=True)},
]

CASES: dict[str, dict] = {
    "qwen_long": _QWEN | {"seq_length": 7},
    "qwen_short": _QWEN | {"seq_length": 64, "max_position_embeddings": 64},
    "baichuan_7b": _BAICHUAN | {"architectures": ["BaiChuanForCausalLM"]},
    "baichuan_13b": _BAICHUAN | {"architectures": ["BaichuanForCausalLM"]},
    "baichuan2_7b": _BAICHUAN | {"architectures": ["BaiChuanForCausalLM"], "z_loss_weight": 0},
    "baichuan2_13b": _BAICHUAN | {"architectures": ["BaichuanForCausalLM"], "z_loss_weight": 0},
    "chatglm": _CHATGLM | {"rope_ratio": 50},
    "chatglm_multi_head": _CHATGLM
    | {
        "multi_query_attention": False,
        "add_bias_linear": True,
        "apply_residual_connection_post_layernorm": True,
        "post_layer_norm": False,
    },
    "internlm2_short": _SMALL
    | {
        "model_type": "internlm2",
        "intermediate_size": 40,
        "rms_norm_eps": 1e-3,
        "rope_theta": 100.0,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "internlm2": _SMALL
    | {
        "model_type": "internlm2",
        "intermediate_size": 40,
        "rms_norm_eps": 1e-3,
        "bias": True,
        "rope_theta": 100.0,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 10,
    },
    "exaone": _SMALL
    | {
        "model_type": "exaone",
        "num_layers": 2,
        "intermediate_size": 40,
        "layer_norm_epsilon": 1e-3,
        "activation_function": "silu",
        "rope_theta": 50.0,
        "rope_scaling": _LLAMA3,
    },
    "nemotron_nas": _SMALL
    | {
        "model_type": "nemotron-nas",
        "num_hidden_layers": len(_BLOCKS),
        "num_key_value_heads": None,
        "intermediate_size": None,
        "rms_norm_eps": 1e-3,
        "rope_theta": 50.0,
        "rope_scaling": _LLAMA3,
        "block_configs": _BLOCKS,
    },
    "phi3small": _SMALL
    | {
        "model_type": "phi3small",
        "num_hidden_layers": 3,
        "ff_intermediate_size": 40,
        "layer_norm_epsilon": 1e-3,
        "hidden_act": "gegelu",
        "gegelu_limit": 0.7,
        "rope_embedding_base": 50.0,
        "mup_use_scaling": True,
        "mup_attn_multiplier": 1.5,
        "mup_embedding_multiplier": 3.0,
        "mup_width_multiplier": 4.0,
        "dense_attention_every_n_layers": 2,
        "blocksparse_block_size": 3,
        "blocksparse_num_local_blocks": 2,
        "blocksparse_vert_stride": 3,
        "blocksparse_homo_head_pattern": False,
        "dummy_token_indices": [3, 17],
    },
}
"""Name -> config.json."""

FUNCTIONS: dict[str, Callable[[Config, Tensors, np.ndarray], np.ndarray]] = {
    "qwen": qwen,
    "baichuan": baichuan,
    "chatglm": chatglm,
    "internlm2": internlm2,
    "exaone": exaone,
    "nemotron-nas": nemotron_nas,
    "phi3small": phi3small,
}
"""model_type -> logits of a sequence."""
