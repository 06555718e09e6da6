# SPDX-License-Identifier: Apache-2.0
"""Which families engines have a model for, by their tables of models."""

from collections.abc import Mapping
from types import MappingProxyType

_MIXED = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "kimi_k2", "llama4", "gpt_oss")
_MORE_MIXED = ("deepseek_v2", "olmoe", "granitemoe", "phimoe", "dbrx", "llama4_text")
_MODERN = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "nemotron-nas")

SERVED: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        # model_executor/models/registry.py of 0.32
        "vllm": frozenset(
            (*_MODERN, *_MIXED, *_MORE_MIXED, "gemma", "gemma2", "gpt2", "gptj", "opt", "bloom")
            + ("falcon", "nemotron")
            + ("granite", "cohere", "cohere2", "chatglm", "glm4", "internlm2", "exaone", "exaone4")
            + ("stablelm",)
        ),
        # docs/supported_models/generative_models.md
        "sglang": frozenset(
            (*_MODERN, *_MIXED, *_MORE_MIXED, "gemma", "gemma2", "phi", "stablelm", "cohere")
            + ("chatglm", "internlm2")
            + ("exaone", "baichuan", "granite", "glm4", "starcoder2")
        ),
        # _torch/models/_arch_index.py
        "trtllm": frozenset((*_MODERN, *_MIXED, "cohere2", "exaone4", "nemotron", "starcoder2")),
        # the families of vLLM that it runs through transformers
        "vllm-transformers": frozenset(
            ("glm", "gpt_neox", "olmo2", "phi", "smollm3", "starcoder2")
        ),
    }
)
"""Engine, or a part of it -> model types."""

TITLES = MappingProxyType(
    {
        "vllm": "vLLM",
        "vllm-transformers": "vLLM through transformers",
        "sglang": "SGLang",
        "trtllm": "TensorRT-LLM",
    }
)


def served_by(model_type: str) -> str:
    """The engines that have a model for a family, for people."""
    return ", ".join(title for name, title in TITLES.items() if model_type in SERVED[name])
