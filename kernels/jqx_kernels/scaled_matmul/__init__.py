# SPDX-License-Identifier: Apache-2.0
"""Products of two stored matrices."""

from .api import SCALED_MATMUL as SCALED_MATMUL
from .api import scaled_matmul as scaled_matmul
from .kinds import KINDS as KINDS
from .kinds import ScaledRequest as ScaledRequest
