# SPDX-License-Identifier: Apache-2.0
"""Mixed precision under a budget: which format every group of linears takes."""

from .search import Budget as Budget
from .search import Found as Found
from .search import Group as Group
from .search import bisected as bisected
from .search import curve as curve
from .search import monotone as monotone
from .search import optimum as optimum
