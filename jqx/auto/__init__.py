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
from .ways import BIT_COUNTS as BIT_COUNTS
from .ways import Counted as Counted
from .ways import Way as Way
from .ways import bits_way as bits_way
from .weighting import PLAIN_BITS as PLAIN_BITS
from .weighting import Weighting as Weighting
