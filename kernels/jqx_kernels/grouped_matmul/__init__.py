# SPDX-License-Identifier: Apache-2.0
"""Products of rows in groups with a matrix each, of a stored stack."""

from .api import GROUPED_MATMUL as GROUPED_MATMUL
from .api import grouped_matmul as grouped_matmul
from .request import GroupedRequest as GroupedRequest
