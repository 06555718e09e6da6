# SPDX-License-Identifier: Apache-2.0
"""ALGORITHMS: how scales are chosen. Each is a pure function (weight, format, statistics) ->
QTensor, one file each.
"""

from .max import LinearStats as LinearStats
from .max import max_calibrate as max_calibrate

ALGORITHMS = {"max": max_calibrate}
