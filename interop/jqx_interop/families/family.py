# SPDX-License-Identifier: Apache-2.0
"""What a family row says: how a config.json of one model_type is read, and what it fixes without
being asked.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from jqx.models import Attention, BlockKind, Experts, Mlp, ModelSpec, Names, Rope

if TYPE_CHECKING:
    from .reader import Reader


def frozen(**pairs: Any) -> Mapping[str, Any]:
    """A table that nobody changes."""
    return MappingProxyType(pairs)


def _every_channel(read: "Reader") -> None:
    return None


def _one_rope(read: "Reader") -> Rope:
    from .rope import rope_from_config

    return rope_from_config(read)


def _as_it_is(read: "Reader", row: Any, i: int | None = None) -> Any:
    return row


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model_type. Meanings are the keys of `DEFAULTS`; all rows share them and the tensor names
    of `Names`.

    `title`: what the models are called. Biases are facts of the family, meanings of config keys, or
    functions of what is read.
    `keys` renames a meaning to the config keys that carry it here, the first non-null one wins;
    `defaults` are values of absent keys, or functions of what is read. `norm` is a kind of norm;
    `layout` where norms are; `qkv` how q, k and v lie; `mlp` the form of the MLP. `qk_norm`: what
    queries and keys are normed over (None: nothing). `rotates`: how many channels of a head turn
    (None: all); `rope`: how. `windows` is a key of WINDOWS: which layers slide. `activations`
    replaces what a config file says by what the weights were trained with. `text`: the
    key of the config inside the config, for models that see more than text. `folds_rows`: ModelOpt
    moves the NVFP4 AWQ factors of o_proj and down_proj into the rows of the linear before them.

    What else a family has is said by functions of what is read: `of_attention` and `of_mlp` finish
    those of every layer, `experts` says which layer has experts, and which, in the place of its
    MLP, `of_layer` finishes a layer by its number, `of_model` the whole.
    """

    model_type: str
    title: str
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=frozen)
    defaults: Mapping[str, Any] = field(default_factory=frozen)
    names: Names = field(default_factory=Names)
    norm: str = "rms"
    norm_bias: bool = False
    layout: "str | Callable[[Reader], str]" = "pre"
    qkv: "str | Callable[[Reader], str]" = "separate"
    qkv_bias: Any = "attention_bias"
    out_bias: Any = "attention_bias"
    qk_norm: "str | None | Callable[[Reader], str | None]" = None
    qk_norm_bias: bool = False
    rope_pairs: str = "halves"
    rope_types: Mapping[str, str] = field(default_factory=frozen)
    rotates: "Callable[[Reader], int | None]" = _every_channel
    rope: "Callable[[Reader], Rope | None]" = _one_rope
    windows: str = "never"
    mlp: str = "gated"
    mlp_bias: Any = False
    activations: Mapping[str, str] = field(default_factory=frozen)
    transposed: bool = False
    head_bias: bool = False
    of_attention: "Callable[[Reader, Attention], Attention]" = _as_it_is
    of_mlp: "Callable[[Reader, Mlp], Mlp]" = _as_it_is
    experts: "Callable[[Reader, Mlp, int], Mlp | Experts]" = _as_it_is
    of_layer: "Callable[[Reader, BlockKind, int], BlockKind]" = _as_it_is
    of_model: "Callable[[Reader, ModelSpec], ModelSpec]" = _as_it_is
    text: str | None = None
    folds_rows: bool = False


DEFAULTS: Mapping[str, Any] = frozen(
    num_key_value_heads=None,  # as many as query heads
    head_dim=None,  # hidden_size / num_attention_heads
    hidden_act="silu",
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    initializer_range=0.02,
    attention_bias=False,
    mlp_bias=False,
    sliding_window=None,
    use_sliding_window=False,
    max_window_layers=28,
    layer_types=None,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
)
"""Values of keys a config file may leave out, where the row says nothing else. A null means None
only where None stands here.
"""

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
