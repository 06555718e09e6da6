# SPDX-License-Identifier: Apache-2.0
"""Rows of ACCEPTS: vLLM on TPUs, transformers, and the layouts of AutoAWQ and GPTQ everywhere."""

from dataclasses import replace

from .accept import Accept, each
from .accepts_gpu import SGLANG_ROW, TRTLLM_NO, TRTLLM_ROW, VLLM_ROW
from .schemes import AWQ, CT, GPTQ, MIXED, MODELOPT, PLAIN, SCHEMES

TPU_ROW = replace(
    VLLM_ROW,
    engine="tpu-vllm",
    source="tpu-inference 0.32 layers/vllm/quantization/nvfp4.py, platforms/tpu_platform.py",
    means="decoding when it loads",
)
TPU_NO = replace(TPU_ROW, loads=False, note="of ModelOpt's layout it has NVFP4 alone")
TPU_CT_ROW = replace(
    TPU_ROW, layout=CT, source="tpu-inference 0.32 layers/vllm/quantization/compressed_tensors"
)
TPU = (
    *each(replace(TPU_ROW, size=16), "NVFP4", "W4A16_NVFP4"),
    *each(TPU_NO, "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "W8A16", MIXED),
    *each(TPU_NO, "NVFP4_AWQ", "NVFP4_SVD", "W4A16_AWQ", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL"),
    *each(TPU_NO, "MXFP4", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8"),
    *each(TPU_CT_ROW, "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "INT8_DYNAMIC", "NVFP4", "NVFP4A16"),
    *each(
        replace(
            TPU_CT_ROW,
            loads=None,
            note="its JAX models read it (layers/jax/quantization/wna16.py), its others do not",
        ),
        "W4A16",
    ),
    *each(
        replace(TPU_CT_ROW, loads=False, note="it has no scheme for it"),
        *("INT8", "W4A16_ASYM", "W8A16", "FP8A16", "MXFP4", "MXFP4A16", "MXFP8"),
    ),
)

HF_ROW = replace(
    VLLM_ROW,
    engine="transformers",
    source="transformers 5.19 quantizers/auto.py, tried on a CPU",
    loads=False,
    note="it skips the quantization of a method it does not know: FP8 weights are read as they are "
    "without their scales, packed ones fail by their shapes",
)
HF_CT_ROW = replace(
    HF_ROW,
    layout=CT,
    loads=True,
    source="transformers 5.19 quantizers/quantizer_compressed_tensors.py",
    note="with the package compressed-tensors, which decodes weights and rounds inputs",
)
TRANSFORMERS = (
    *each(HF_ROW, *(name for layout, name in SCHEMES if layout == MODELOPT), MIXED),
    *each(HF_CT_ROW, *(name for layout, name in SCHEMES if layout == CT)),
    replace(
        HF_ROW,
        layout=AWQ,
        scheme="W4A16",
        loads=True,
        source="transformers 5.19 quantizers/quantizer_awq.py",
        note="with the package gptqmodel",
    ),
    *each(
        replace(
            HF_ROW,
            layout=GPTQ,
            loads=True,
            source="transformers 5.19 quantizers/quantizer_gptq.py",
            note="with the packages gptqmodel and optimum",
        ),
        *("W4A16", "W8A16", "W4A16_ASYM"),
    ),
)

INT_LAYOUTS = (
    replace(
        VLLM_ROW,
        layout=AWQ,
        scheme="W4A16",
        least=75,
        means="Marlin",
        source="vLLM 0.32 layers/quantization/auto_awq.py",
    ),
    *each(
        replace(
            VLLM_ROW,
            layout=GPTQ,
            least=75,
            means="Marlin",
            source="vLLM 0.32 layers/quantization/auto_gptq.py",
        ),
        *("W4A16", "W8A16"),
    ),
    replace(
        VLLM_ROW,
        layout=GPTQ,
        scheme="W4A16_ASYM",
        loads=False,
        note="it takes symmetric codes alone",
        source="vLLM 0.32 layers/quantization/auto_gptq.py TYPE_MAP",
    ),
    replace(
        SGLANG_ROW,
        layout=AWQ,
        scheme="W4A16",
        native=80,
        least=75,
        means="kernels of AWQ",
        source="SGLang 0.5.23 srt/layers/quantization/awq/awq.py",
    ),
    *each(
        replace(
            SGLANG_ROW,
            layout=GPTQ,
            native=80,
            least=60,
            means="kernels of GPTQ",
            source="SGLang 0.5.23 srt/layers/quantization/gptq/gptq.py",
        ),
        *("W4A16", "W8A16"),
    ),
    replace(
        SGLANG_ROW,
        layout=GPTQ,
        scheme="W4A16_ASYM",
        least=60,
        means="kernels of GPTQ",
        source="SGLang 0.5.23 srt/layers/quantization/gptq/gptq.py",
    ),
    *(
        replace(
            TRTLLM_NO,
            layout=layout,
            scheme=scheme,
            note=f"it has no case for quant_method {layout}",
            source="TensorRT-LLM _torch/model_config.py load_hf_quant_config (read, not run)",
        )
        for layout, scheme in SCHEMES
        if layout in (AWQ, GPTQ)
    ),
    replace(
        TPU_ROW,
        layout=AWQ,
        scheme="W4A16",
        source="tpu-inference 0.32 layers/vllm/quantization/awq.py",
    ),
    *each(
        replace(
            TPU_ROW,
            layout=GPTQ,
            loads=False,
            note="GPTQ is none of its methods",
            source="tpu-inference 0.32 layers/vllm/quantization/__init__.py",
        ),
        *("W4A16", "W8A16", "W4A16_ASYM"),
    ),
)

UNQUANTIZED = tuple(
    Accept(engine=row.engine, layout=PLAIN, scheme=PLAIN, loads=True, source=row.source)
    for row in (VLLM_ROW, SGLANG_ROW, TRTLLM_ROW, TPU_ROW, HF_ROW)
)
