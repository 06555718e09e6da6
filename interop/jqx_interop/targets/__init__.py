# SPDX-License-Identifier: Apache-2.0
"""Deployment layouts: how a quantized tree lies on disk, and the files that describe it."""

from .layout import named as named
from .layout import outputs as outputs
from .modelopt import find_algo as find_algo
from .table import TARGETS as TARGETS
from .table import Target as Target
