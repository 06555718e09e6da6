# SPDX-License-Identifier: Apache-2.0
"""Mixed precision under a budget: which format every group of linears takes."""

from .mixing import NONE as NONE
from .mixing import Mixable as Mixable
from .mixing import mixed as mixed
from .search import Budget as Budget
from .search import Found as Found
from .search import Group as Group
from .search import bisected as bisected
from .search import curve as curve
from .search import monotone as monotone
from .search import optimum as optimum
from .weighting import PLAIN_BITS as PLAIN_BITS
from .weighting import Weighting as Weighting
from .weighting import active_ratio as active_ratio
from .weighting import bits_of as bits_of
