# SPDX-License-Identifier: Apache-2.0
"""Deployment layouts: how a quantized tree lies on disk, and the files that describe it."""

from .ct_config import Described as Described
from .ct_config import read_described as read_described
from .ct_layout import RECIPROCALS as RECIPROCALS
from .ct_layout import inexact_scales as inexact_scales
from .ct_schemes import METHOD as METHOD
from .layout import INNER as INNER
from .layout import OUTER as OUTER
from .layout import companions as companions
from .layout import input_factor as input_factor
from .layout import low_rank_factors as low_rank_factors
from .modelopt import find_algo as find_algo
from .modelopt_choices import choices_of as choices_of
from .modelopt_choices import kv_of as kv_of
from .modelopt_read import Stated as Stated
from .modelopt_read import read_stated as read_stated
from .table import TARGETS as TARGETS
from .table import Target as Target
