# SPDX-License-Identifier: Apache-2.0
"""EXPERTS: schemes that an engine reads in linears, and not in experts as far as is known; STACKED:
what it does with experts of which all lie in one tensor.
"""

from dataclasses import dataclass

from .schemes import CT, GPTQ, MODELOPT


@dataclass(frozen=True, slots=True)
class Differs:
    """What an engine does with experts in a scheme: `loads` False or None, why, and whence."""

    loads: bool | None
    note: str
    source: str


_VLLM = Differs(
    False,
    "its experts in FP8 have one scale a tensor",
    "vLLM 0.32 layers/quantization/modelopt.py ModelOptFp8MoEMethod",
)
_VLLM_CT = Differs(
    False,
    "it has no scheme for experts in it",
    "vLLM 0.32 compressed_tensors_moe/compressed_tensors_moe.py",
)
_SGLANG_CT = Differs(
    False,
    "it has experts in it on NPUs alone",
    "SGLang 0.5.23 compressed_tensors/compressed_tensors.py get_moe_scheme",
)
_SGLANG_GPTQ = Differs(
    False,
    "its experts go by Marlin, for symmetric codes alone",
    "SGLang 0.5.23 srt/layers/quantization/gptq/gptq.py",
)
_TPU_CT = Differs(
    False,
    "it has no scheme for experts in it",
    "tpu-inference 0.32 compressed_tensors_moe/compressed_tensors_moe.py",
)


def _unread(engine: str) -> Differs:
    return Differs(None, f"how {engine} reads experts in it was not found out", "no rule here")


EXPERTS: dict[tuple[str, str, str], Differs] = {
    ("vllm", MODELOPT, "FP8_PER_CHANNEL_PER_TOKEN"): _VLLM,
    ("vllm", MODELOPT, "FP8_PB_WO"): _VLLM,
    **dict.fromkeys((("vllm", CT, name) for name in ("INT8", "FP8A16")), _VLLM_CT),
    **dict.fromkeys(
        (("sglang", CT, name) for name in ("INT8", "INT8_DYNAMIC", "FP8A16")), _SGLANG_CT
    ),
    ("sglang", GPTQ, "W4A16_ASYM"): _SGLANG_GPTQ,
    ("sglang", MODELOPT, "NVFP4_AWQ"): _unread("SGLang"),
    ("tpu-vllm", CT, "INT8_DYNAMIC"): _TPU_CT,
    **dict.fromkeys(
        (("tpu-vllm", CT, name) for name in ("NVFP4", "NVFP4A16")), _unread("vLLM on TPUs")
    ),
    ("tpu-vllm", MODELOPT, "W4A16_NVFP4"): _unread("vLLM on TPUs"),
    **dict.fromkeys(
        (
            ("trtllm", MODELOPT, name)
            for name in ("FP8_PER_CHANNEL_PER_TOKEN", "W8A16", "W4A16_AWQ", "W4A8_AWQ")
            + ("MXFP8", "NVFP4_AWQ", "W4A16_NVFP4")
        ),
        _unread("TensorRT-LLM"),
    ),
}
"""(engine, layout, scheme) -> what differs from linears."""


_MLLAMA = "vLLM 0.32 models/mllama4.py _rename_weight_for_modelopt_checkpoint (read)"
_SCALES = "it has no names for the scales of experts in one tensor"
STACKED: dict[tuple[str, str, str], Differs] = {
    ("vllm", "llama4", "FP8"): Differs(True, "", _MLLAMA),
    ("vllm", "llama4", "NVFP4"): Differs(True, "", _MLLAMA),
    **dict.fromkeys(
        (("vllm", "llama4_text", name) for name in ("FP8", "NVFP4", "W4A16_NVFP4")),
        Differs(False, _SCALES, "vLLM 0.32 models/llama4.py load_weights (read)"),
    ),
    **dict.fromkeys(
        (("vllm", "gpt_oss", name) for name in ("FP8", "NVFP4", "W4A16_NVFP4")),
        Differs(False, _SCALES, "vLLM 0.32 models/gpt_oss.py hf_to_vllm_mapper (read)"),
    ),
    ("sglang", "llama4", "FP8"): Differs(
        True, "", "SGLang srt/models/mllama4.py _handle_expert_scale_params (read)"
    ),
    ("sglang", "llama4", "NVFP4"): Differs(
        False,
        "it gives every expert the block scales of all",
        "SGLang srt/models/mllama4.py _handle_expert_scale_params (read)",
    ),
    **dict.fromkeys(
        (("trtllm", "llama4", name) for name in ("FP8", "NVFP4")),
        Differs(True, "", "TensorRT-LLM _torch/modules/fused_moe/quantization.py (read)"),
    ),
}
"""(engine, model_type, scheme) -> what it does; what is not here was not found out."""
