# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization of language models in JAX."""

from .algorithms import ALGORITHMS as ALGORITHMS
from .config import KEEP as KEEP
from .config import QuantConfig as QuantConfig
from .config import Rule as Rule
from .errors import InputError as InputError
from .formats import FORMATS as FORMATS
from .formats import Format as Format
from .formats import decode as decode
from .formats import encode as encode
from .formats import fake_quantize as fake_quantize
from .recipes import RECIPES as RECIPES
from .recipes import Recipe as Recipe
from .tensors import QTensor as QTensor
from .tensors import Stats as Stats
from .transforms import observe as observe
from .transforms import quantized as quantized
