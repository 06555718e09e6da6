# SPDX-License-Identifier: Apache-2.0
"""Deployment layouts: how a quantized tree lies on disk, and the files that describe it."""

from .layout import INNER as INNER
from .layout import OUTER as OUTER
from .layout import companions as companions
from .layout import gathered as gathered
from .layout import input_factor as input_factor
from .layout import low_rank_factors as low_rank_factors
from .layout import named as named
from .layout import outputs as outputs
from .modelopt import find_algo as find_algo
from .modelopt_choices import choices_of as choices_of
from .modelopt_choices import kv_of as kv_of
from .modelopt_read import Stated as Stated
from .modelopt_read import read_stated as read_stated
from .table import TARGETS as TARGETS
from .table import Target as Target
