# SPDX-License-Identifier: Apache-2.0
"""RECIPES: the named configurations, as rows. A recipe is what `--qformat` names.

Names, patterns and formats follow NVIDIA ModelOpt 0.47 (modelopt.torch.quantization.config); each
row also answers to ModelOpt's constant (`FP8_DEFAULT_CFG`) and to the short names its scripts used
earlier.
"""

from dataclasses import dataclass

from .config import KV_FORMATS, QuantConfig, Rule
from .errors import nearest

NEVER_QUANTIZED = (
    "*block_sparse_moe.gate*",
    "*linear_attn.conv1d*",
    "*self_attention.conv1d*",
    "*linear_attn.in_proj_a*",
    "*linear_attn.in_proj_b*",
    "*lm_head*",
    "*mixer.conv1d*",
    "*mlp.gate.*",
    "*mlp.shared_expert_gate.*",
    "*output_layer*",
    "embed_out.*",
    "*proj_out.*",
    "*router*",
    "mtp.*",
    "output.*",
    "*embed_vision*",
    "*vision_tower*",
    "*visual*",
    "*vision_model*",
    "*multi_modal_projector*",
)
"""What no recipe quantizes: heads, routers, small convolutions, vision towers. ModelOpt's default
list, and the name that GPT-NeoX checkpoints give the head.
"""

MLP = ("*mlp*", "*.mixer.up_proj.*", "*.mixer.down_proj.*", "*block_sparse_moe*", "*.experts.*")
MLP_WEIGHTS = ("*mlp*", "*block_sparse_moe*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A named configuration, the other names it answers to, and one line for people."""

    name: str
    config: QuantConfig
    aliases: tuple[str, ...] = ()
    summary: str = ""


def _recipe(
    name: str,
    aliases: str,
    formats: tuple[str, str | None],
    summary: str,
    globs: tuple[str, ...] = ("*",),
    algorithm: str | None = "max",
) -> Recipe:
    """`formats` (weight, input) for the linears that `globs` match, never for heads and such."""
    weight, inputs = formats
    chosen = tuple(Rule(path_glob=g, weight=weight, input=inputs, kind="linear") for g in globs)
    off = tuple(Rule(path_glob=g, weight=None, input=None) for g in NEVER_QUANTIZED)
    config = QuantConfig(rules=chosen + off, algorithm=algorithm)
    return Recipe(name=name, config=config, aliases=tuple(aliases.split()), summary=summary)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        _recipe(
            "fp8",
            "FP8_DEFAULT_CFG",
            ("fp8", "fp8"),
            "FP8 weights and inputs, a scale per tensor",
        ),
        _recipe(
            "fp8_per_channel_per_token",
            "FP8_PER_CHANNEL_PER_TOKEN_CFG fp8_pc_pt",
            ("fp8_channel", "fp8_token"),
            "FP8, a scale per output channel and per token",
        ),
        _recipe(
            "fp8_2d_blockwise_weight_only",
            "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG fp8_pb_wo",
            ("fp8_block", None),
            "FP8 weights, a scale per 128x128 block",
        ),
        _recipe(
            "int8",
            "INT8_DEFAULT_CFG",
            ("int8", "int8"),
            "INT8 weights per output channel, inputs per tensor",
        ),
        _recipe(
            "int8_weight_only",
            "INT8_WEIGHT_ONLY_CFG int8_wo",
            ("int8", None),
            "INT8 weights, a scale per output channel",
        ),
        _recipe(
            "int4_blockwise_weight_only",
            "INT4_BLOCKWISE_WEIGHT_ONLY_CFG int4_wo int4",
            ("int4", None),
            "INT4 weights, a scale per 128 inputs",
        ),
        _recipe(
            "nvfp4",
            "NVFP4_DEFAULT_CFG",
            ("nvfp4", "nvfp4"),
            "NVFP4 weights and inputs, blocks of 16",
        ),
        _recipe(
            "w4a16_nvfp4",
            "W4A16_NVFP4_CFG",
            ("nvfp4", None),
            "NVFP4 weights, blocks of 16",
        ),
        _recipe(
            "w4a8_nvfp4_fp8",
            "W4A8_NVFP4_FP8_CFG",
            ("nvfp4_b32_fp8", "fp8"),
            "NVFP4 weights in blocks of 32, FP8 inputs",
        ),
        _recipe(
            "nvfp4_mlp_only",
            "NVFP4_MLP_ONLY_CFG",
            ("nvfp4", "nvfp4"),
            "NVFP4 in the MLPs, the rest untouched",
            globs=MLP,
        ),
        _recipe(
            "nvfp4_omlp_only",
            "NVFP4_OMLP_ONLY_CFG",
            ("nvfp4", "nvfp4"),
            "NVFP4 in the MLPs and the attention output",
            globs=("*o_proj*", *MLP),
        ),
        _recipe(
            "nvfp4_mlp_weight_only",
            "NVFP4_MLP_WEIGHT_ONLY_CFG nvfp4_mlp_wo",
            ("nvfp4_b32", None),
            "NVFP4 weights of the MLPs, blocks of 32",
            globs=MLP_WEIGHTS,
        ),
        _recipe(
            "mxfp4",
            "MXFP4_DEFAULT_CFG",
            ("mxfp4", "mxfp4"),
            "MXFP4 weights and inputs",
            algorithm=None,
        ),
        _recipe(
            "mxfp4_mlp_weight_only",
            "MXFP4_MLP_WEIGHT_ONLY_CFG mxfp4_mlp_wo",
            ("mxfp4", None),
            "MXFP4 weights of the MLPs",
            globs=MLP_WEIGHTS,
            algorithm=None,
        ),
        _recipe(
            "w4a8_mxfp4_fp8",
            "W4A8_MXFP4_FP8_CFG",
            ("mxfp4", "fp8"),
            "MXFP4 weights, FP8 inputs scaled by the engine",
            algorithm=None,
        ),
        _recipe(
            "mxfp8",
            "MXFP8_DEFAULT_CFG",
            ("mxfp8", "mxfp8"),
            "MXFP8 weights and inputs",
            algorithm=None,
        ),
    )
}

KV_ALIASES = {
    "FP8_KV_CFG": "fp8",
    "FP8_AFFINE_KV_CFG": "fp8_affine",
    "NVFP4_KV_CFG": "nvfp4",
    "NVFP4_AFFINE_KV_CFG": "nvfp4_affine",
}


def find_recipe(name: str) -> Recipe:
    """The recipe that answers to `name`: its own name, ModelOpt's constant or an earlier short
    name.

    Raises InputError with the nearest names.
    """
    names = {alias: row for row in RECIPES.values() for alias in (row.name, *row.aliases)}
    if name not in names:
        raise nearest(name, names, "format")
    return names[name]


def find_kv(name: str) -> str | None:
    """The KV cache format called `name`; "none" is None.

    Raises InputError with the nearest names.
    """
    name = KV_ALIASES.get(name, name)
    if name != "none" and name not in KV_FORMATS:
        raise nearest(name, ("none", *KV_FORMATS), "KV cache format")
    return None if name == "none" else name


def with_kv(config: QuantConfig, kv: str | None) -> QuantConfig:
    """`config` with the keys and values of every attention stored as `kv`."""
    rule = Rule(path_glob="*", kv=kv, kind="attention")
    return QuantConfig(rules=(*config.rules, rule), algorithm=config.algorithm)
