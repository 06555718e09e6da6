# SPDX-License-Identifier: Apache-2.0
"""The bundled model through the headline recipes: quantized, measured, plotted."""

from .run import HEADLINE as HEADLINE
from .run import Demo as Demo
from .run import Row as Row
from .run import run_demo as run_demo
