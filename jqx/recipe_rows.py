# SPDX-License-Identifier: Apache-2.0
"""The rows of RECIPES.

Names, patterns and formats follow NVIDIA ModelOpt 0.47 (modelopt.torch.quantization.config); each
row also answers to ModelOpt's constant (`FP8_DEFAULT_CFG`) and to the short names its scripts used
earlier. ModelOpt's NVFP4_FP8_MHA_CONFIG alone leaves nothing out; here heads and tables stay as
they are.
"""

from dataclasses import dataclass, replace

from .config import Algorithm, QuantConfig, Rule

NEVER_QUANTIZED = (
    "*block_sparse_moe.gate*",
    "*linear_attn.conv1d*",
    "*self_attention.conv1d*",
    "*linear_attn.in_proj_a*",
    "*linear_attn.in_proj_b*",
    "*lm_head*",
    "*mixer.conv1d*",
    "*mixer.gate.*",
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

FEED_FORWARD = ("*mlp*", "*.mixer.up_proj.*", "*.mixer.down_proj.*", "*block_sparse_moe*")
MLP_WEIGHTS = ("*mlp*", "*block_sparse_moe*")
EXPERTS = ("*block_sparse_moe*", "*.experts.*")
MAMBA_ATTENTION = (
    "*fc1_latent_proj*",
    "*fc2_latent_proj*",
    "*q_proj*",
    "*k_proj*",
    "*v_proj*",
    "*o_proj*",
    "*self_attention.linear_qkv*",
    "*self_attention.linear_proj*",
)
MAMBA_MIXERS = (*MAMBA_ATTENTION, "*mixer.in_proj*", "*mixer.out_proj*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A named configuration, the other names it answers to, one line for people, and the format of
    keys and values, None to leave them.
    """

    name: str
    config: QuantConfig
    aliases: tuple[str, ...] = ()
    summary: str = ""
    kv_cache: str | None = None

    @property
    def whole(self) -> QuantConfig:
        """The configuration, keys and values included."""
        return self.config if self.kv_cache is None else with_kv(self.config, self.kv_cache)


def with_kv(config: QuantConfig, kv: str | None) -> QuantConfig:
    """`config` with the keys and values of every attention stored as `kv`."""
    rule = Rule(path_glob="*", kv=kv, kind="attention")
    return QuantConfig(rules=(*config.rules, rule), algorithm=config.algorithm)


def _recipe(
    names: str,
    formats: str,
    summary: str,
    algorithm: str | Algorithm | None = "max",
    globs: tuple[str, ...] = ("*",),
    off: tuple[str, ...] = (),
) -> Recipe:
    """`names`: its own, then the others; `formats`: of weights and inputs ("-": none) of the
    linears that `globs` match, never of heads and such; `off`: what else is left alone.
    """
    name, *aliases = names.split()
    weight, inputs = (None if word == "-" else word for word in formats.split())
    chosen = tuple(Rule(path_glob=g, weight=weight, input=inputs, kind="linear") for g in globs)
    left = tuple(Rule(path_glob=g, weight=None, input=None) for g in (*NEVER_QUANTIZED, *off))
    config = QuantConfig(rules=chosen + left, algorithm=algorithm)
    return Recipe(name=name, config=config, aliases=tuple(aliases), summary=summary)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        _recipe("fp8 FP8_DEFAULT_CFG", "fp8 fp8", "FP8 weights and inputs, a scale per tensor"),
        _recipe(
            "fp8_per_channel_per_token FP8_PER_CHANNEL_PER_TOKEN_CFG fp8_pc_pt",
            "fp8_channel fp8_token",
            "FP8, a scale per output channel and per token",
        ),
        _recipe(
            "fp8_2d_blockwise_weight_only FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG fp8_pb_wo",
            "fp8_block -",
            "FP8 weights, a scale per 128x128 block",
        ),
        _recipe(
            "int8 INT8_DEFAULT_CFG",
            "int8 int8",
            "INT8 weights per output channel, inputs per tensor",
        ),
        _recipe(
            "int8_smoothquant INT8_SMOOTHQUANT_CFG int8_sq",
            "int8 int8",
            "INT8, outliers of inputs moved into the weights",
            "smoothquant",
        ),
        _recipe(
            "int8_weight_only INT8_WEIGHT_ONLY_CFG int8_wo",
            "int8 -",
            "INT8 weights, a scale per output channel",
        ),
        _recipe(
            "int4_blockwise_weight_only INT4_BLOCKWISE_WEIGHT_ONLY_CFG int4_wo int4",
            "int4 -",
            "INT4 weights, a scale per 128 inputs",
        ),
        _recipe(
            "int4_awq INT4_AWQ_CFG",
            "int4 -",
            "INT4 weights, input channels scaled by how much they matter",
            Algorithm.of("awq_lite", alpha_step=0.1),
        ),
        _recipe(
            "int4_gptq",
            "int4 -",
            "INT4 weights, each column makes up for the rounding before it",
            "gptq",
        ),
        _recipe(
            "int4_wmse",
            "int4 -",
            "INT4 weights, scales with the smallest error weighted by inputs",
            "wmse",
        ),
        _recipe(
            "w4a8_awq_beta W4A8_AWQ_BETA_CFG w4a8_awq",
            "int4_fp8 fp8",
            "INT4 weights read as FP8, FP8 inputs, scaled as int4_awq",
            "awq_lite",
        ),
        _recipe("nvfp4 NVFP4_DEFAULT_CFG", "nvfp4 nvfp4", "NVFP4 weights and inputs, blocks of 16"),
        _recipe(
            "nvfp4_awq_lite NVFP4_AWQ_LITE_CFG nvfp4_awq",
            "nvfp4 nvfp4",
            "NVFP4, input channels scaled by how much they matter",
            "awq_lite",
        ),
        _recipe(
            "nvfp4_awq_clip NVFP4_AWQ_CLIP_CFG",
            "nvfp4 nvfp4",
            "NVFP4, clipped where that lowers the error of the outputs",
            Algorithm.of("awq_clip"),
        ),
        _recipe(
            "nvfp4_awq_full NVFP4_AWQ_FULL_CFG",
            "nvfp4 nvfp4",
            "NVFP4, scaled and clipped",
            Algorithm.of("awq_full", alpha_step=0.1),
        ),
        _recipe(
            "nvfp4_svdquant NVFP4_SVDQUANT_DEFAULT_CFG",
            "nvfp4 nvfp4",
            "NVFP4 beside the 32 largest components of the weights",
            Algorithm.of("svdquant", lowrank=32),
        ),
        _recipe(
            "nvfp4_gptq",
            "nvfp4 nvfp4",
            "NVFP4, each column makes up for the rounding before it",
            "gptq",
        ),
        _recipe(
            "nvfp4_wmse",
            "nvfp4 nvfp4",
            "NVFP4, scales with the smallest error weighted by inputs",
            "wmse",
        ),
        _recipe(
            "nvfp4_four_over_six NVFP4_FOUR_OVER_SIX_CFG nvfp4_4o6",
            "nvfp4_46 nvfp4",
            "NVFP4, every block ends at 6 or at 4, whichever fits",
            Algorithm.of(
                "mse",
                fp8_scale_sweep=False,
                start_multiplier=1.0,
                stop_multiplier=1.5,
                step_size=0.5,
            ),
        ),
        _recipe(
            "nvfp4_w4a4_weight_mse_fp8_sweep NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG nvfp4_mse",
            "nvfp4 nvfp4",
            "NVFP4, the best of all FP8 scales of every block",
            Algorithm.of("mse", fp8_scale_sweep=True),
        ),
        _recipe(
            "nvfp4_w4a4_weight_local_hessian NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG "
            "nvfp4_local_hessian",
            "nvfp4 nvfp4",
            "NVFP4, the FP8 scales that are best for the outputs",
            Algorithm.of("local_hessian", fp8_scale_sweep=True),
        ),
        _recipe("w4a16_nvfp4 W4A16_NVFP4_CFG", "nvfp4 -", "NVFP4 weights, blocks of 16"),
        _recipe(
            "w4a8_nvfp4_fp8 W4A8_NVFP4_FP8_CFG",
            "nvfp4_b32_fp8 fp8",
            "NVFP4 weights in blocks of 32, FP8 inputs",
        ),
        _recipe(
            "nvfp4_mlp_only NVFP4_MLP_ONLY_CFG",
            "nvfp4 nvfp4",
            "NVFP4 in the MLPs, the rest untouched",
            globs=(*FEED_FORWARD, "*.experts.*"),
        ),
        _recipe(
            "nvfp4_omlp_only NVFP4_OMLP_ONLY_CFG",
            "nvfp4 nvfp4",
            "NVFP4 in the MLPs and the attention output",
            globs=("*o_proj*", *FEED_FORWARD),
        ),
        replace(
            _recipe(
                "nvfp4_deepseek",
                "nvfp4 nvfp4",
                "what ModelOpt's DeepSeek script does: nvfp4_omlp_only, keys and values in FP8",
                globs=("*o_proj*", *FEED_FORWARD),
            ),
            kv_cache="fp8_cast",
        ),
        _recipe(
            "nvfp4_experts_only NVFP4_EXPERTS_ONLY_CFG",
            "nvfp4 nvfp4",
            "NVFP4 in the experts, the rest untouched",
            globs=EXPERTS,
        ),
        _recipe(
            "nvfp4_mlp_weight_only NVFP4_MLP_WEIGHT_ONLY_CFG nvfp4_mlp_wo",
            "nvfp4_b32 -",
            "NVFP4 weights of the MLPs, blocks of 32",
            globs=MLP_WEIGHTS,
        ),
        replace(
            _recipe(
                "nvfp4_fp8_mha NVFP4_FP8_MHA_CONFIG",
                "nvfp4 nvfp4",
                "NVFP4, and keys and values in FP8",
            ),
            kv_cache="fp8",
        ),
        _recipe(
            "mamba_moe_fp8_aggressive MAMBA_MOE_FP8_AGGRESSIVE_CFG",
            "fp8 fp8",
            "FP8 in everything but attention",
            off=MAMBA_ATTENTION,
        ),
        _recipe(
            "mamba_moe_fp8_conservative MAMBA_MOE_FP8_CONSERVATIVE_CFG",
            "fp8 fp8",
            "FP8 in everything but attention and mixers",
            off=MAMBA_MIXERS,
        ),
        _recipe(
            "mamba_moe_nvfp4_aggressive MAMBA_MOE_NVFP4_AGGRESSIVE_CFG",
            "nvfp4 nvfp4",
            "NVFP4 in everything but attention",
            off=MAMBA_ATTENTION,
        ),
        _recipe(
            "mamba_moe_nvfp4_conservative MAMBA_MOE_NVFP4_CONSERVATIVE_CFG",
            "nvfp4 nvfp4",
            "NVFP4 in everything but attention and mixers",
            off=MAMBA_MIXERS,
        ),
        _recipe("mxfp4 MXFP4_DEFAULT_CFG", "mxfp4 mxfp4", "MXFP4 weights and inputs", None),
        _recipe(
            "mxfp4_mlp_weight_only MXFP4_MLP_WEIGHT_ONLY_CFG mxfp4_mlp_wo",
            "mxfp4 -",
            "MXFP4 weights of the MLPs",
            None,
            MLP_WEIGHTS,
        ),
        _recipe(
            "w4a8_mxfp4_fp8 W4A8_MXFP4_FP8_CFG",
            "mxfp4 fp8",
            "MXFP4 weights, FP8 inputs scaled by the engine",
            None,
        ),
        _recipe("mxfp8 MXFP8_DEFAULT_CFG", "mxfp8 mxfp8", "MXFP8 weights and inputs", None),
        _recipe(
            "mxfp6 MXFP6_DEFAULT_CFG",
            "mxfp6 mxfp6",
            "MXFP6 weights and inputs; not for checkpoints",
            None,
        ),
        _recipe(
            "mxint8 MXINT8_DEFAULT_CFG",
            "mxint8 mxint8",
            "MXINT8 weights and inputs; not for checkpoints",
            None,
        ),
    )
}
