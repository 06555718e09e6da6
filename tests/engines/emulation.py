# SPDX-License-Identifier: Apache-2.0
"""Kernels for vLLM on a CPU where it has none: `register()` in a process before a model is loaded.

For NVFP4, MXFP8 and MXFP4 they are vLLM's own emulations, which it ships for GPUs and does not
offer on a CPU; for blocks of FP8, NVFP4 weights alone, packed integers, decoding MXFP4, and
rounding to FP8, a few lines of torch. Inputs of MXFP8 and MXFP4 stay as they are, as in its kernels
for GPUs that cannot multiply these; FP8 keys and values are rounded. All take float32, in which
nothing but the format makes a difference. What reads the configuration and the tensors, fuses
linears and reconciles their scales stays vLLM's: that is what is tested with them.

Written for vLLM 0.32. Imported in its environment alone.
"""

import sys

import torch
import vllm._custom_ops as ops
import vllm.model_executor.kernels.linear as linear
import vllm.model_executor.kernels.linear.mxfp4.emulation as mxfp4
import vllm.model_executor.layers.fusion.quant_activation as fusion
import vllm.model_executor.layers.quantization.auto_gptq as auto_gptq
import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors  # noqa: F401
import vllm.model_executor.layers.quantization.modelopt as modelopt
from torch.nn.functional import linear as product
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.utils import nvfp4_emulation_utils as nvfp4
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

LARGEST = 448.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Fp8Blocks(linear.CPUFp8BlockScaledMMKernel):
    """FP8 weights with a scale per block; inputs stay as they are, as in the kernel for AMX."""

    @classmethod
    def is_supported(cls, compute_capability=None):
        return True, None

    def process_weights_after_loading(self, layer):
        """Nothing is packed."""

    def apply_weights(self, layer, x, bias=None, **kwargs):
        params = self._get_layer_params(layer)
        n, k = params.weight.shape
        rows, columns = self.weight_group_shape
        scale = params.block_scale.float().repeat_interleave(rows, 0)[:n]
        scale = scale.repeat_interleave(columns, 1)[:, :k]
        return product(x, (params.weight.float() * scale).to(x.dtype), bias)


class Nvfp4Weights(linear.EmulationNvFp4LinearKernel):
    """NVFP4 weights, inputs as they are."""

    def apply_weights(self, layer, x, bias=None):
        weight = nvfp4.dequantize_to_dtype(
            layer.weight.data.view(torch.uint8),
            layer.weight_scale.data,
            layer.weight_global_scale,
            x.dtype,
            block_size=16,
            swizzle=False,
        )
        return product(x, weight, bias)


class PackedInts(MPLinearKernel):
    """INT4 and INT8 weights that lie in words of 32 bits, inputs as they are."""

    BITS = {scalar_types.uint4b8: 4, scalar_types.uint8b128: 8}

    @classmethod
    def get_min_capability(cls):
        return -1

    @classmethod
    def can_implement(cls, c):
        return c.weight_type in cls.BITS and not c.zero_points, "not symmetric INT4 or INT8"

    def process_weights_after_loading(self, layer):
        """The words of a row in one row, its scales too."""
        words, scale, _ = self._get_weight_params(layer)
        if words.input_dim == 0:
            words.data = words.data.t().contiguous()
        if scale.output_dim == 1:
            scale.data = scale.data.t().contiguous()

    def apply_weights(self, layer, x, bias=None):
        words, scale, _ = self._get_weight_params(layer)
        bits = self.BITS[self.config.weight_type]
        places = torch.arange(0, 32, bits, dtype=torch.int32)
        codes = (words.data[:, :, None] >> places) & ((1 << bits) - 1)
        codes = codes.reshape(words.shape[0], -1).float() - (1 << (bits - 1))
        scale = scale.data.float().repeat_interleave(codes.shape[1] // scale.shape[1], 1)
        return product(x, (codes * scale).to(x.dtype), bias)


def decode_mxfp4(codes, scale, dtype):
    """Bytes of two E2M1 codes, the first in the low bits, times powers of two for every 32."""
    pairs = torch.stack((codes & 15, codes >> 4), -1).reshape(codes.shape[0], -1).long()
    values = torch.tensor(E2M1)[pairs & 7] * torch.where(pairs > 7, -1.0, 1.0)
    powers = torch.exp2(scale.view(torch.uint8).float() - 127)
    return (values * powers.repeat_interleave(32, 1)).to(dtype)


def round_fp8(  # noqa: PLR0913  vLLM's arguments
    input,
    scale=None,
    num_token_padding=None,
    scale_ub=None,
    use_per_token_if_dynamic=False,
    output=None,
    group_shape=None,
):
    """What vLLM's operation `scaled_fp8_quant` does on a GPU."""
    if scale is None:
        by_token = input.abs().amax(-1, keepdim=True)
        largest = by_token if use_per_token_if_dynamic else by_token.amax().reshape(1)
        scale = (largest.float() / LARGEST).clamp(min=1 / (LARGEST * 512))
    codes = (input.float() * (1 / scale.float())).clamp(-LARGEST, LARGEST)
    codes = codes.to(torch.float8_e4m3fn)
    return (codes if output is None else output.copy_(codes)), scale


def cache_rounded(  # noqa: PLR0913  vLLM's arguments
    key, value, key_cache, value_cache, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
):
    """What is written into the cache: the operation of vLLM's CPU build cuts off what FP8 has no
    bits for, so it is given numbers that FP8 has.
    """
    if kv_cache_dtype.startswith("fp8"):
        key = round_fp8(key, torch.tensor(k_scale))[0].to(key.dtype)
        value = round_fp8(value, torch.tensor(v_scale))[0].to(value.dtype)
        k_scale = v_scale = 1.0
    torch.ops._C.cpu_attn_reshape_and_cache(
        key, value, key_cache, value_cache, slots, isa, k_scale, v_scale, kv_cache_dtype
    )


def everywhere(name, new):
    """Put `new` in the place of what all modules of vLLM have imported as `name`."""
    modules = [m for key, m in list(sys.modules.items()) if key.startswith("vllm.")]
    for module in modules:
        if name in vars(module):
            setattr(module, name, new)


def register():
    """Offer all of these on a CPU."""
    cpu = PlatformEnum.CPU
    linear._POSSIBLE_NVFP4_KERNELS[cpu] = [linear.EmulationNvFp4LinearKernel]
    linear._POSSIBLE_MXFP8_KERNELS[cpu] = [linear.EmulationMxfp8LinearKernel]
    linear._POSSIBLE_MXFP4_KERNELS[cpu] = [mxfp4.EmulationMxfp4LinearKernel]
    linear._POSSIBLE_FP8_BLOCK_KERNELS[cpu] = [Fp8Blocks]
    linear._POSSIBLE_KERNELS[cpu] = [PackedInts, *linear._POSSIBLE_KERNELS.get(cpu, [])]
    mxfp4.has_quark = lambda: True  # its functions are replaced
    mxfp4.dequant_mxfp4 = decode_mxfp4
    mxfp4._ACTIVATION_QUANT_DEQUANT_FUNCS[mxfp4.kMxfp4Dynamic] = lambda x: x
    ops.scaled_fp8_quant = round_fp8
    ops.cpu_attn_reshape_and_cache = cache_rounded
    for module in (modelopt, auto_gptq):
        for config in vars(module).values():
            if isinstance(config, type) and issubclass(config, QuantizationConfig):
                config.get_supported_act_dtypes = lambda self: [torch.float32, torch.bfloat16]
    chosen = linear.init_nvfp4_linear_kernel

    def nvfp4_kernel(use_a16=False):
        return Nvfp4Weights(linear.NvFp4LinearLayerConfig()) if use_a16 else chosen()

    everywhere("init_nvfp4_linear_kernel", nvfp4_kernel)
    assert fusion.expose_input_quant_key is not None
    everywhere("expose_input_quant_key", lambda layer, kernel: None)  # silu alone, then rounding
