# SPDX-License-Identifier: Apache-2.0
"""What a stored number is: elements, formats, and the arithmetic between arrays and stored
bytes.
"""

from jqx_kernels.blocks import block_amax as block_amax
from jqx_kernels.blocks import weight_amax as weight_amax
from jqx_kernels.packing import unpacked_shape as unpacked_shape

from .elements import Element as Element
from .encode import Encoded as Encoded
from .encode import decode as decode
from .encode import encode as encode
from .encode import fake_quantize as fake_quantize
from .encode import fake_quantize_scaled as fake_quantize_scaled
from .format import FORMATS as FORMATS
from .format import Format as Format
from .format import check_divides as check_divides
from .format import find_format as find_format
from .format import grid_shape as grid_shape
from .format import storage_of as storage_of
from .format import with_float_scales as with_float_scales
from .scales import step_of as step_of
