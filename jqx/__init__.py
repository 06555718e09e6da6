# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization of language models in JAX."""

from .algorithms import ALGORITHMS as ALGORITHMS
from .api import compress as compress
from .api import dequantize as dequantize
from .api import fake_quantized as fake_quantized
from .api import kv_rounding as kv_rounding
from .api import quantize as quantize
from .auto.function import AutoQuantized as AutoQuantized
from .auto.function import auto_quantize as auto_quantize
from .calibration.run import calibrate as calibrate
from .config import KEEP as KEEP
from .config import Algorithm as Algorithm
from .config import QuantConfig as QuantConfig
from .config import Rule as Rule
from .errors import InputError as InputError
from .formats import FORMATS as FORMATS
from .formats import Format as Format
from .formats import decode as decode
from .formats import encode as encode
from .formats import fake_quantize as fake_quantize
from .recipes import CONSTANTS, KV_ALIASES, constant
from .recipes import RECIPES as RECIPES
from .recipes import Recipe as Recipe
from .tensors import QTensor as QTensor
from .tensors import Stats as Stats
from .transforms import Axes as Axes
from .transforms import axes as axes
from .transforms import observe as observe
from .transforms import probe as probe
from .transforms import probes as probes
from .transforms import quantized as quantized


def __getattr__(name: str) -> QuantConfig:
    """ModelOpt's constants, such as `jqx.NVFP4_AWQ_LITE_CFG`, as configurations."""
    return constant(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *CONSTANTS, *KV_ALIASES})
