# SPDX-License-Identifier: Apache-2.0
"""Rows of ACCEPTS: the layouts of ModelOpt and of compressed-tensors in engines for GPUs."""

from dataclasses import replace
from functools import partial

from .accept import Accept, each
from .schemes import CT, MIXED, MODELOPT

Row = partial(Accept, scheme="", loads=True)
W8, W4 = "Marlin, inputs as they are", "Marlin, inputs as they are"

VLLM_ROW = Row(
    engine="vllm", layout=MODELOPT, source="vLLM 0.32 layers/quantization/modelopt.py LINEAR_ALGOS"
)
VLLM_NO = replace(
    VLLM_ROW,
    loads=False,
    note="it takes FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, NVFP4, W4A16_NVFP4 and MXFP8 alone "
    '("ModelOpt currently only supports")',
)
VLLM = (
    *each(replace(VLLM_ROW, native=89, least=80, means=W8), "FP8", "FP8_PER_CHANNEL_PER_TOKEN"),
    replace(
        VLLM_ROW,
        scheme="FP8_PB_WO",
        native=89,
        least=80,
        means=W8,
        note="inputs are rounded to FP8 in blocks of 128, too",
    ),
    replace(VLLM_ROW, scheme="NVFP4", native=100, least=75, means=W4, size=16),
    replace(
        VLLM_ROW, scheme="W4A16_NVFP4", least=75, means="Marlin", size=16, takes=("input_scale",)
    ),
    replace(VLLM_ROW, scheme="MXFP8", native=100, least=80, means=W8),
    replace(VLLM_ROW, scheme=MIXED, least=75, means="what its formats have"),
    *each(VLLM_NO, "NVFP4_AWQ", "NVFP4_SVD", "W4A16_AWQ", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL"),
    *each(VLLM_NO, "W8A16", "MXFP4", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8"),
)

VLLM_CT_ROW = replace(
    VLLM_ROW,
    layout=CT,
    source="vLLM 0.32 layers/quantization/compressed_tensors/compressed_tensors.py",
)
VLLM_CT = (
    *each(replace(VLLM_CT_ROW, least=75, means="Marlin"), "W4A16", "W4A16_ASYM", "W8A16", "FP8A16"),
    *each(replace(VLLM_CT_ROW, native=75, least=75), "INT8", "INT8_DYNAMIC"),
    *each(replace(VLLM_CT_ROW, native=89, least=75, means=W8), "FP8", "FP8_DYNAMIC", "FP8_BLOCK"),
    replace(VLLM_CT_ROW, scheme="NVFP4", native=100, least=75, means=W4),
    replace(VLLM_CT_ROW, scheme="NVFP4A16", least=75, means="Marlin"),
    replace(VLLM_CT_ROW, scheme="MXFP4", native=100, least=80, means=W4),
    replace(
        VLLM_CT_ROW,
        scheme="MXFP4A16",
        native=100,
        least=80,
        means=W4,
        differs=True,
        note="it has one scheme for MXFP4: from capability 10.0 it rounds inputs, too, though none "
        "are said to be quantized",
    ),
    replace(VLLM_CT_ROW, scheme="MXFP8", native=100, least=75, means=W8),
)

SGLANG_ROW = replace(
    VLLM_ROW, engine="sglang", source="SGLang 0.5.23 srt/layers/quantization/modelopt_quant.py"
)
SGLANG_NO = replace(
    SGLANG_ROW,
    loads=False,
    note="it takes FP8, NVFP4, NVFP4_AWQ and W4A16_NVFP4 alone, in capitals",
)
SGLANG_CT_ROW = replace(
    SGLANG_ROW,
    layout=CT,
    source="SGLang 0.5.23 srt/layers/quantization/compressed_tensors/compressed_tensors.py",
)
SGLANG = (
    replace(SGLANG_ROW, scheme="FP8", native=89, least=89),
    replace(SGLANG_ROW, scheme="NVFP4", native=100, least=80, means=W4, size=16),
    replace(
        SGLANG_ROW,
        scheme="NVFP4_AWQ",
        native=100,
        least=80,
        means=W4,
        size=16,
        takes=("pre_quant_scale",),
    ),
    replace(
        SGLANG_ROW, scheme="W4A16_NVFP4", least=80, means="Marlin", size=16, takes=("input_scale",)
    ),
    replace(SGLANG_ROW, scheme=MIXED, least=80, means="what its formats have"),
    replace(
        SGLANG_NO,
        scheme="MXFP8",
        note="its native mxfp8 wants weight_scale_inv, and drops weight_scale with a warning",
        source="SGLang 0.5.23 srt/configs/model_config.py",
    ),
    *each(
        SGLANG_NO, "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4_SVD", "W4A16_AWQ", "W4A8_AWQ"
    ),
    *each(SGLANG_NO, "W8A8_SQ_PER_CHANNEL", "W8A16", "MXFP4", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8"),
    *each(
        replace(SGLANG_CT_ROW, least=80, means="Marlin"), "W4A16", "W4A16_ASYM", "W8A16", "NVFP4A16"
    ),
    *each(replace(SGLANG_CT_ROW, native=80, least=80), "INT8", "INT8_DYNAMIC"),
    *each(replace(SGLANG_CT_ROW, native=89, least=80, means=W8), "FP8", "FP8_DYNAMIC"),
    replace(SGLANG_CT_ROW, scheme="FP8_BLOCK", native=89, least=89),
    replace(SGLANG_CT_ROW, scheme="FP8A16", least=80, means="Marlin"),
    replace(SGLANG_CT_ROW, scheme="NVFP4", native=100, least=80, means=W4),
    *each(
        replace(SGLANG_CT_ROW, loads=False, note="it has no scheme for it outside of experts"),
        *("MXFP4", "MXFP4A16", "MXFP8"),
    ),
)

TRTLLM_ROW = replace(
    VLLM_ROW,
    engine="trtllm",
    source="TensorRT-LLM _torch/modules/linear.py and quantization/mode.py (read, not run)",
)
TRTLLM_NO = replace(TRTLLM_ROW, loads=False)
TRTLLM_CT_ROW = replace(
    TRTLLM_ROW,
    layout=CT,
    source="TensorRT-LLM models/quant_config_utils.py (read, not run)",
    loads=None,
)
UNREAD = "its description is understood; how linears take these tensors was not read"
TRTLLM = (
    *each(TRTLLM_ROW, "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "W8A16", MIXED),
    *each(
        replace(TRTLLM_ROW, size=16, takes=("pre_quant_scale", "input_scale")),
        *("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4"),
    ),
    replace(TRTLLM_ROW, scheme="W4A8_NVFP4_FP8", size=32),
    replace(TRTLLM_ROW, scheme="W4A8_MXFP4_FP8", takes=("input_scale",)),
    *each(
        replace(TRTLLM_ROW, takes=("pre_quant_scale",), needs=("pre_quant_scale",)),
        *("W4A16_AWQ", "W4A8_AWQ"),
    ),
    replace(
        TRTLLM_NO,
        scheme="W8A8_SQ_PER_CHANNEL",
        note="its PyTorch backend has no linear for the name",
    ),
    *each(replace(TRTLLM_NO, note="the name is none of its QuantAlgo"), "MXFP4", "NVFP4_SVD"),
    *each(replace(TRTLLM_CT_ROW, note=UNREAD), "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "MXFP4A16"),
    *each(
        replace(
            TRTLLM_CT_ROW, loads=False, note="it wants weights by channel or block, inputs by token"
        ),
        *("FP8", "INT8"),
    ),
    replace(
        TRTLLM_CT_ROW,
        scheme="INT8_DYNAMIC",
        loads=False,
        note="it takes 8 bits by channel for FP8_PER_CHANNEL_PER_TOKEN, whatever their type",
    ),
    *each(
        replace(
            TRTLLM_CT_ROW, loads=False, note="it reads no integer codes and no such inputs there"
        ),
        *("W4A16", "W4A16_ASYM", "W8A16", "FP8A16", "NVFP4A16", "MXFP4", "MXFP8"),
    ),
)
