# SPDX-License-Identifier: Apache-2.0
"""Pytrees that hold more than plain arrays, and the names of the leaves of a tree."""

from .qtensor import QTensor as QTensor
from .stats import Stats as Stats
