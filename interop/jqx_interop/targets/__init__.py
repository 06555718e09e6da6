# SPDX-License-Identifier: Apache-2.0
"""Deployment layouts: how a quantized tree lies on disk, and the files that describe it."""

from .ct_layout import RECIPROCALS as RECIPROCALS
from .ct_layout import ZERO_POINT as ZERO_POINT
from .ct_layout import inexact_scales as inexact_scales
from .ct_layout import zeros_of as zeros_of
from .ct_schemes import METHOD as METHOD
from .int4_layout import INDEX as INDEX
from .int4_layout import holds as holds
from .layout import INNER as INNER
from .layout import OUTER as OUTER
from .layout import companions as companions
from .layout import input_factor as input_factor
from .layout import low_rank_factors as low_rank_factors
from .layout import module_and_leaf as module_and_leaf
from .modelopt import find_algo as find_algo
from .reading import Said as Said
from .reading import layout_of as layout_of
from .table import SMALL as SMALL
from .table import TARGETS as TARGETS
from .table import Target as Target
