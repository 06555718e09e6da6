# SPDX-License-Identifier: Apache-2.0
"""What a decoder is: every architectural choice as a field of a frozen, hashable row.

    ModelSpec  = sizes + Names + one BlockKind per layer
    BlockKind  = Attention + Mlp or Experts + Norm + layout: all that the program of one block
                 depends on

A field whose values are words is the key of a table (`LAYOUTS` here, `NORMS` and `ACTIVATIONS` in
layers.py, `SCALINGS` and `PAIRS` in rope.py, `PROJECTIONS` and `QK_NORMS` in projections.py, `MLPS`
in mlp.py, `ROUTERS` in routing.py, `STORES` in stores.py), so a new choice is a new entry there.
Layers that differ (windows, widths) have different kinds.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary positions: pairs of channels of a head rotate by position * theta^(-2i/d), scaled as
    `scaling` says.

    `dims` is d: how many channels of a head rotate, the first ones (None: all). `pairs` is a key of
    PAIRS: which of them belong together. Cosines and sines are multiplied by `magnitude`, past the
    trained length by `long_magnitude` if that is given. `trained_length` is the context the
    frequencies were trained for, where a scaling refers to one.
    """

    theta: float
    scaling: str = "default"  # key of SCALINGS
    dims: int | None = None
    pairs: str = "halves"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    magnitude: float = 1.0
    long_magnitude: float | None = None
    trained_length: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """A normalisation of the last axis; `kind` is a key of NORMS. `bias`: whether one is added."""

    kind: str
    eps: float
    bias: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Alibi:
    """Attention that fades with distance: slope * position of the key is added to scores.

    The slopes of heads are powers of 2^(-most / heads). `scaled`: scores are scaled after it is
    added. `rounded`: slopes, positions and products are bfloat16 numbers.
    """

    most: float = 8.0
    scaled: bool = False
    rounded: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Sparse:
    """Attention to blocks of `block` tokens: a query sees the `near` blocks up to its own, and of
    all others those whose number plus that of the head plus 1 is a multiple of `stride`.
    """

    block: int
    near: int
    stride: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Latent:
    """Queries, keys and values that are made of fewer channels: `kv_rank` of keys and values, with
    a norm, `q_rank` of queries (None: of the input, without one). `rotating` channels of a head
    turn; those of keys are made of the input itself, the same for all heads.
    """

    kv_rank: int
    q_rank: int | None
    rotating: int
    norm: Norm


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Causal self-attention; query head i reads key/value head i // (heads / kv_heads).

    A query sees the keys at distances 0 .. window - 1 (`None`: all earlier ones), of those at its
    own number position // `chunk`. Scores are multiplied by `scale`, then bent as cap * tanh(scores
    / cap). `qkv` is a key of PROJECTIONS: how q, k and v lie in the checkpoint, `latent` what that
    of "latent" has more; what they come out as, normed, is clamped to +-`clip`. `value_dim`:
    channels of a head of values, where not `head_dim`. `qk_norm` normalises queries and keys before
    they rotate; `qk_norm_of` is a key of QK_NORMS: over what. With `unit_eps` heads of them
    are divided by their root mean squares after that. Queries at positions p >= `log_from` are
    multiplied by log(p + 1) / log(log_from), with `heat` (scale, floor) by 1 + scale log(1 +
    floor((p + 1) / floor)). `sinks`: a learned score for each head, of nothing.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None
    qkv: str = "separate"
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None
    qk_norm_of: str = "head"
    cap: float | None = None
    clip: float | None = None
    alibi: Alibi | None = None
    sparse: Sparse | None = None
    log_from: int | None = None
    latent: Latent | None = None
    value_dim: int | None = None
    chunk: int | None = None
    unit_eps: float | None = None
    heat: tuple[float, float] | None = None
    sinks: bool = False

    @property
    def values(self) -> int:
        """Channels of a head of values."""
        return self.value_dim or self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class Mlp:
    """Two layers with `inner` channels between them; `form` is a key of MLPS, `activation` one of
    ACTIVATIONS.

    `limit`: what the channels of the form "gegelu" are clipped to, None where they are not.
    """

    inner: int
    activation: str
    bias: bool = False
    form: str = "gated"
    limit: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Router:
    """Which experts a token goes to, and with what weights; `kind` is a key of ROUTERS.

    `groups` of experts of which a token chooses `top_groups` first. Weights are divided by their
    `power`-norm where that is given, then multiplied by `scale`. `bias`: of logits; `corrected`:
    whether one is added to scores for the choice alone. `exact`: logits and weights are float32,
    whatever the model is. `threshold`: of "sparsemixer".
    """

    kind: str
    groups: int = 1
    top_groups: int = 1
    power: float | None = None
    scale: float = 1.0
    bias: bool = False
    corrected: bool = False
    exact: bool = False
    threshold: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """`number` MLPs like `each`, of which every token takes `top_k`, weighted as `router` says.

    `store` is a key of STORES: how they lie in a checkpoint. `weighs_input`: weights multiply what
    experts read, not what they make. `shared`: an MLP that all tokens take too, with
    `shared_gate` times the sigmoid of a linear; `residual`: one that reads what attention left
    through a norm of its own, while the experts read the input of the block.
    """

    number: int
    top_k: int
    each: Mlp
    router: Router
    store: str = "separate"
    weighs_input: bool = False
    shared: Mlp | None = None
    shared_gate: bool = False
    residual: Mlp | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Replaced:
    """One square linear in the place of attention or of an MLP."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockKind:
    """All that the program of one block depends on: blocks of equal kind share one compiled
    program.

    `attention` and `mlp` are None where a block has none, and then it has no norm for them either.
    `layout` is a key of LAYOUTS. What attention and MLP add is multiplied by `residual_scale`. With
    `normed_residual` it is added to the normed input. `transposed`: weights are [k, n] on disk.
    """

    attention: Attention | Replaced | None
    mlp: Mlp | Experts | Replaced | None
    norm: Norm
    layout: str = "pre"
    residual_scale: float = 1.0
    normed_residual: bool = False
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a block has norms: before and after attention and MLP, and after what they add is
    added. `parallel`: both read the input of the block; `own`: the MLP through a norm of its own.
    `aside`: experts read the input of the block, and an MLP beside them what attention left.
    """

    before: bool = False
    after: bool = False
    summed: bool = False
    parallel: bool = False
    own: bool = False
    aside: bool = False


LAYOUTS = {
    "pre": Layout(before=True),
    "post": Layout(after=True),
    "sandwich": Layout(before=True, after=True),
    "summed": Layout(summed=True),
    "parallel": Layout(before=True, parallel=True),
    "parallel_two": Layout(before=True, parallel=True, own=True),
    "aside": Layout(before=True, aside=True),
}
"""BlockKind.layout -> where norms are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """Module names of the checkpoint; from `input_norm` on, relative to the prefix of the block.

    `input_norm` and `mlp_norm` come before attention and MLP, `attention_end` and `mlp_end` after
    them. `k` and `v` also name what scales of stored keys and values belong to, where a checkpoint
    has no such linear. `prefix`: what all names begin with in some checkpoints, not in others.
    """

    prefix: str = ""
    embed: str = "model.embed_tokens"
    positions: str = "model.embed_positions"
    embed_norm: str = "model.embed_norm"
    project_in: str = "model.project_in"
    project_out: str = "model.project_out"
    block: str = "model.layers.{}"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    input_norm: str = "input_layernorm"
    attention_end: str = "post_attention_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = "self_attn.qkv_proj"
    out: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    kept_k: str = "self_attn.k"  # what the rotated keys are called where they are observed
    kept_v: str = "self_attn.v"
    replaced_attention: str = "self_attn.linear_attn"
    mlp_norm: str = "post_attention_layernorm"
    mlp_end: str = "post_feedforward_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    gate_up: str = "mlp.gate_up_proj"
    down: str = "mlp.down_proj"
    replaced_mlp: str = "mlp.linear_mlp"
    q_a: str = "self_attn.q_a_proj"
    q_a_norm: str = "self_attn.q_a_layernorm"
    q_b: str = "self_attn.q_b_proj"
    kv_a: str = "self_attn.kv_a_proj_with_mqa"
    kv_a_norm: str = "self_attn.kv_a_layernorm"
    kv_b: str = "self_attn.kv_b_proj"
    sinks: str = "self_attn.sinks"  # a tensor
    router: str = "mlp.gate"
    correction: str = "mlp.gate.e_score_correction_bias"  # a tensor
    expert_gate: str = "mlp.experts.{}.gate_proj.weight"  # tensors; {}: the number of the expert
    expert_up: str = "mlp.experts.{}.up_proj.weight"
    expert_gate_up: str = "mlp.experts.gate_up_proj"
    expert_down: str = "mlp.experts.{}.down_proj.weight"
    experts: str = "mlp.experts"  # what names of experts begin with that fused ones get apart
    shared_gate: str = "mlp.shared_expert.gate_proj"
    shared_up: str = "mlp.shared_expert.up_proj"
    shared_down: str = "mlp.shared_expert.down_proj"
    shared_scorer: str = "mlp.shared_expert_gate"
    residual_norm: str = "residual_layernorm"
    residual_gate: str = "residual_mlp.w1"
    residual_up: str = "residual_mlp.w3"
    residual_down: str = "residual_mlp.w2"
    buffers: tuple[str, ...] = ("*.rotary_emb.inv_freq",)  # globs: tensors that are no parameters
    carried: tuple[str, ...] = ()  # globs: tensors of other models, which stay as they are


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A decoder-only language model. Hashable, so it is a static argument of jitted functions.

    `blocks` has one kind per layer, in order. `positions` is (rows of a table of learned positions,
    the row of position 0). Embeddings are multiplied by `embedding_scale`, which with
    `rounded_scale` is first rounded to the dtype of their weight; `embed_width`: what they have
    instead of `hidden` channels. With `tied`, the embedding is also the head and there is no head
    tensor. `unit_head`: rows of the head are divided by their lengths. Logits are multiplied by
    `logit_scale`, then bent by `logit_cap` as scores are, and those of `unused` tokens are as low
    as can be. `init_range` is the standard deviation of freshly drawn weights. `kv_cache` is the
    row of KV_FORMATS that keys and values are rounded to, None if they are not.
    """

    family: str
    vocab: int
    hidden: int
    blocks: tuple[BlockKind, ...]
    final_norm: Norm | None
    positions: tuple[int, int] | None = None
    embed_width: int | None = None
    embed_norm: Norm | None = None
    embedding_scale: float | None = None
    rounded_scale: bool = True
    tied: bool = False
    head_bias: bool = False
    unit_head: bool = False
    logit_scale: float | None = None
    logit_cap: float | None = None
    unused: tuple[int, ...] = ()
    init_range: float = 0.02
    kv_cache: str | None = None
    names: Names = field(default_factory=Names)
