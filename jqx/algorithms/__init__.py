# SPDX-License-Identifier: Apache-2.0
"""ALGORITHMS: how scales are chosen. Each is a pure function (linear, format, statistics,
parameters) -> linear, one file each.
"""

from .linear import InputStats as InputStats
from .linear import Linear as Linear
from .linear import stored as stored
from .table import ALGORITHMS as ALGORITHMS
from .turns import calibrated as calibrated
from .turns import finished as finished
from .turns import lanes_for as lanes_for
from .turns import of_each as of_each
