# SPDX-License-Identifier: Apache-2.0
"""What a decoder is: every architectural choice as a field of a frozen, hashable row.

    ModelSpec  = sizes + Names + one BlockKind per layer
    BlockKind  = Attention + Mlp + Norm: everything the program of one block depends on
    Compute    = the arithmetic a program is run in

A field whose values are words is the key of a table of functions (`NORMS`, `ACTIVATIONS` in
layers.py, `SCALINGS` in rope.py), so a new choice is a new entry there. Layers that differ
(windows, widths) have different kinds.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary positions: pairs (i, i + d/2) of a head rotate by position * theta^(-2i/d), scaled as
    `scaling` says.

    `trained_length` is the context the frequencies were trained for, where a scaling refers to one.
    """

    theta: float
    scaling: str = "default"  # key of SCALINGS
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    trained_length: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """A normalisation of the last axis; `kind` is a key of NORMS."""

    kind: str
    eps: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Causal self-attention; query head i reads key/value head i // (heads / kv_heads).

    A query sees the keys at distances 0 .. window - 1 (`None`: all earlier ones). Scores are
    multiplied by `scale`. `qk_norm` normalises queries and keys over head_dim before they rotate.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Mlp:
    """down(act(gate(x)) * up(x)) with `inner` channels; `activation` is a key of ACTIVATIONS."""

    inner: int
    activation: str
    bias: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockKind:
    """All that the program of one block depends on: blocks of equal kind share one compiled
    program.
    """

    attention: Attention
    mlp: Mlp
    norm: Norm


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """Module names of the checkpoint; from `input_norm` on, relative to the prefix of the block."""

    embed: str = "model.embed_tokens"
    block: str = "model.layers.{}"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    input_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    out: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    kept_k: str = "self_attn.k"  # what the rotated keys are called where they are observed
    kept_v: str = "self_attn.v"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    buffers: tuple[str, ...] = ("*.rotary_emb.inv_freq",)  # globs: tensors that are no parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A decoder-only language model. Hashable, so it is a static argument of jitted functions.

    `blocks` has one kind per layer, in order. With `tied`, the embedding is also the head and there
    is no head tensor. `embedding_scale` multiplies embeddings after it is rounded to the dtype of
    the embedding weight. `init_range` is the standard deviation of freshly drawn weights.
    `kv_cache` is the row of KV_FORMATS that keys and values are rounded to, None if they are not.
    """

    family: str
    vocab: int
    hidden: int
    blocks: tuple[BlockKind, ...]
    final_norm: Norm
    tied: bool = False
    embedding_scale: float | None = None
    init_range: float = 0.02
    kv_cache: str | None = None
    names: Names = field(default_factory=Names)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """The arithmetic: every operation accumulates in float32, and its result is a value of `dtype`.

    `carrier` is the dtype of the arrays that hold those values, and of the operands of matrix
    products: a float32 carrier of bfloat16 values is for CPUs without units that multiply them.
    `strict` rounds every result on its bits; otherwise the compiler may keep more precision between
    operations that it fuses. `attention` is "chunks" (2-D products per key/value head and 128
    queries, for CPUs) or "batched" (for accelerators). `cache` is the row of CACHE_FORMATS in which
    keys and values are kept between calls, None where they are kept as they are.
    """

    dtype: jnp.dtype = jnp.dtype("float32")
    carrier: jnp.dtype = jnp.dtype("float32")
    strict: bool = True
    attention: str = "chunks"
    cache: str | None = None

    @property
    def precision(self) -> jax.lax.Precision:
        """Matrix products of float32 are exact products on every device; those of bfloat16 always
        are.
        """
        exact = self.carrier == jnp.dtype("float32")
        return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


_BFLOAT16 = jnp.dtype("bfloat16")
FLOAT32 = Compute()
BF16 = Compute(dtype=_BFLOAT16)
COMPUTES = {
    ("float32", "cpu"): FLOAT32,
    ("bf16", "cpu"): BF16,
    ("float32", "cpu with bf16 units"): FLOAT32,
    ("bf16", "cpu with bf16 units"): Compute(dtype=_BFLOAT16, carrier=_BFLOAT16),
    ("float32", "accelerator"): Compute(attention="batched"),
    ("bf16", "accelerator"): Compute(
        dtype=_BFLOAT16, carrier=_BFLOAT16, strict=False, attention="batched"
    ),
}
"""(name, kind of device) -> Compute."""
