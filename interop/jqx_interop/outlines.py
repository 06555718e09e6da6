# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint will hold by its config.json alone: names and shapes of tensors, for plans of
models that are not on this disk.

Families that are defined here have their parameters; of mixtures of experts OUTLINES knows enough
to count. Names and shapes are those of the checkpoints on the Hub.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jqx.errors import InputError, nearest
from jqx.models import param_shapes

from .checkpoints import (
    Checkpoint,
    MappedTensors,
    TensorInfo,
    one_line,
    open_checkpoint,
    read_beside,
)
from .checkpoints.checks import MODEL_DTYPES
from .checkpoints.layout import nbytes
from .families import FAMILIES, spec_from_config
from .inventory import KEPT
from .sources import title_of, without_description

PLAIN = ("gate_proj", "up_proj", "down_proj")
Shapes = Iterator[tuple[str, tuple[int, ...]]]
MOST_EXPERTS = 10_000  # more are a damaged config


class Config:
    """Sizes in a config.json, by name. Raises InputError for those that are none."""

    def __init__(self, values: Mapping[str, Any]):
        """`values` as they are in the file."""
        self._values = values

    def __call__(self, key: str, default: int | None = None, least: int = 1) -> int:
        """The whole number `key`, or `default` where it is absent or null."""
        value = self._values.get(key)
        value = default if value is None else value
        if type(value) is not int or not least <= value <= 1 << 40:
            raise InputError(f"config.json has {key} {value!r}, not a whole number from {least}")
        return value

    def given(self, key: str) -> Any:
        """The value of `key`, None where it is absent."""
        return self._values.get(key)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """A mixture of experts. `attention`: the linears of attention; `mlp`: the module with router
    and experts; `linears`: what those of an expert are called, gate, up and down; `experts`,
    `inner`: keys of their number and size; `dense`: which layers have none; `shared`: the module
    and size of what all tokens take; `gates`: further linears of the module;
    `corrected`: whether the router has a bias of its scores; `predicts`: the most
    layers after the last that predict further tokens.
    """

    attention: Callable[[Config], Shapes]
    mlp: str = "mlp"
    linears: tuple[str, str, str] = PLAIN
    experts: str = "num_experts"
    inner: str = "moe_intermediate_size"
    dense: Callable[[Config, int], bool] = lambda config, i: False
    shared: Callable[[Config], tuple[str, int] | None] = lambda config: None
    gates: tuple[str, ...] = ()
    corrected: bool = False
    predicts: int = 0
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")


def _grouped(config: Config, *, norms: str = "", biases: bool = False) -> Shapes:
    """Attention of groups of query heads. `norms`: whether queries and keys have norms, of a "head"
    or of "all" heads; `biases`: whether q, k and v have them.
    """
    hidden, heads = config("hidden_size"), config("num_attention_heads")
    dim = config("head_dim", hidden // heads)
    rows = {"q": heads * dim} | dict.fromkeys("kv", config("num_key_value_heads", heads) * dim)
    for letter, n in rows.items():
        yield f"self_attn.{letter}_proj.weight", (n, hidden)
        if biases:
            yield f"self_attn.{letter}_proj.bias", (n,)
    yield "self_attn.o_proj.weight", (hidden, heads * dim)
    if norms:
        for letter in "qk":
            yield f"self_attn.{letter}_norm.weight", (dim if norms == "head" else rows[letter],)


def _latent(config: Config) -> Shapes:
    """Attention with latent keys and values (DeepSeek V2 and V3)."""
    hidden, heads = config("hidden_size"), config("num_attention_heads")
    rope, nope = config("qk_rope_head_dim"), config("qk_nope_head_dim")
    latent, value = config("kv_lora_rank"), config("v_head_dim")
    queries = heads * (rope + nope)
    if config.given("q_lora_rank") is None:
        yield "self_attn.q_proj.weight", (queries, hidden)
    else:
        rank = config("q_lora_rank")
        yield "self_attn.q_a_proj.weight", (rank, hidden)
        yield "self_attn.q_a_layernorm.weight", (rank,)
        yield "self_attn.q_b_proj.weight", (queries, rank)
    yield "self_attn.kv_a_proj_with_mqa.weight", (latent + rope, hidden)
    yield "self_attn.kv_a_layernorm.weight", (latent,)
    yield "self_attn.kv_b_proj.weight", (heads * (nope + value), latent)
    yield "self_attn.o_proj.weight", (hidden, heads * value)


def _qwen_dense(config: Config, i: int) -> bool:
    only = config.given("mlp_only_layers") or []
    if not isinstance(only, list):
        raise InputError(f"config.json has mlp_only_layers {only!r}, not a list of layers")
    return i in only or (i + 1) % config("decoder_sparse_step", 1) != 0


def _deepseek_shared(config: Config) -> tuple[str, int] | None:
    count = config("n_shared_experts", 0, least=0)
    size = config("moe_intermediate_size") * count
    return ("mlp.shared_experts", size) if count else None


_DEEPSEEK = Outline(
    attention=_latent,
    experts="n_routed_experts",
    dense=lambda config, i: i < config("first_k_dense_replace", 0, least=0),
    shared=_deepseek_shared,
    predicts=4,
)
OUTLINES = {
    "mixtral": Outline(
        attention=_grouped,
        mlp="block_sparse_moe",
        linears=("w1", "w3", "w2"),
        experts="num_local_experts",
        inner="intermediate_size",
    ),
    "olmoe": Outline(attention=partial(_grouped, norms="all"), inner="intermediate_size"),
    "qwen3_moe": Outline(attention=partial(_grouped, norms="head"), dense=_qwen_dense),
    "qwen2_moe": Outline(
        attention=partial(_grouped, biases=True),
        dense=_qwen_dense,
        shared=lambda config: ("mlp.shared_expert", config("shared_expert_intermediate_size")),
        gates=("shared_expert_gate",),
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": replace(_DEEPSEEK, corrected=True),
    "kimi_k2": replace(_DEEPSEEK, corrected=True),
}
"""model_type -> what its layers hold."""


def open_outline(model: str | Path) -> Checkpoint:
    """The checkpoint `model`, without numbers where `model` is a config.json, or a directory that
    has one and no weights; else as `open_checkpoint`.

    Weights that a config.json says are quantized count as plain ones of the model's dtype. Raises
    InputError for a model_type of which neither parameters nor outline are known.
    """
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if any(file.parent.glob("*.safetensors")) or not file.is_file() or file.suffix != ".json":
        return open_checkpoint(model)
    config = read_beside(file.parent, file.name) or {}
    try:
        return _outlined(file, config)
    except InputError as error:
        raise InputError(one_line(f"{file}: {error}")) from error


def _outlined(file: Path, config: dict[str, Any]) -> Checkpoint:
    plain = without_description(config)
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    plain["torch_dtype"] = name.removeprefix("torch.")
    dtype = MODEL_DTYPES.get(plain["torch_dtype"], "BF16")
    tensors, end = {}, 0
    for tensor, shape in _shapes(plain):
        own = "F32" if tensor.endswith(KEPT) else dtype
        start, end = end, end + nbytes(own, shape)
        tensors[tensor] = TensorInfo(tensor, own, shape, file, start, end)
    source = title_of(config)
    return Checkpoint(file.parent, plain, tensors, (), MappedTensors(()), source=source)


def _shapes(config: dict[str, Any]) -> Shapes:
    kind = config.get("model_type")
    if kind in FAMILIES:
        yield from param_shapes(spec_from_config(config)).items()
    elif kind in OUTLINES:
        yield from _parameters(OUTLINES[str(kind)], Config(config))
    else:
        known = nearest(str(kind), (*FAMILIES, *OUTLINES), "model_type")
        raise InputError(f"there are no weights beside it, and by itself it tells little: {known}")


def outlined_parameters(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of a model_type of OUTLINES. Raises InputError for sizes
    that are none.
    """
    return dict(_parameters(OUTLINES[str(config.get("model_type"))], Config(config)))


def _parameters(row: Outline, config: Config) -> Shapes:
    """Every parameter, in module order."""
    hidden, vocab = config("hidden_size"), config("vocab_size")
    experts = config(row.experts)
    if experts > MOST_EXPERTS or config("num_hidden_layers") > MOST_EXPERTS:
        raise InputError(f"config.json has {row.experts} {experts}: no model has so many")
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(config("num_hidden_layers")):
        prefix = f"model.layers.{i}"
        yield from ((f"{prefix}.{name}", shape) for name, shape in row.attention(config))
        if row.dense(config, i):
            yield from _expert(f"{prefix}.mlp", PLAIN, hidden, config("intermediate_size"))
        else:
            yield from _mixture(row, config, prefix)
        yield from ((f"{prefix}.{norm}.weight", (hidden,)) for norm in row.norms)
    yield "model.norm.weight", (hidden,)
    if not config.given("tie_word_embeddings"):
        yield "lm_head.weight", (vocab, hidden)


def _mixture(row: Outline, config: Config, prefix: str) -> Shapes:
    hidden, count = config("hidden_size"), config(row.experts)
    yield f"{prefix}.{row.mlp}.gate.weight", (count, hidden)
    if row.corrected:
        yield f"{prefix}.{row.mlp}.gate.{KEPT}", (count,)
    for e in range(count):
        at = f"{prefix}.{row.mlp}.experts.{e}"
        yield from _expert(at, row.linears, hidden, config(row.inner))
    if (shared := row.shared(config)) is not None:
        yield from _expert(f"{prefix}.{shared[0]}", PLAIN, hidden, shared[1])
    yield from ((f"{prefix}.{row.mlp}.{gate}.weight", (1, hidden)) for gate in row.gates)


def _expert(at: str, names: tuple[str, str, str], hidden: int, inner: int) -> Shapes:
    gate, up, down = names
    yield f"{at}.{gate}.weight", (inner, hidden)
    yield f"{at}.{up}.weight", (inner, hidden)
    yield f"{at}.{down}.weight", (hidden, inner)
