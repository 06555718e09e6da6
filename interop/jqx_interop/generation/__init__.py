# SPDX-License-Identifier: Apache-2.0
"""Texts going on: prompts of several kinds, how tokens are drawn, and the text they become."""

from .run import Arithmetic as Arithmetic
from .run import Completion as Completion
from .run import Generation as Generation
from .run import generate as generate
from .run import run as run
from .settings import Sampling as Sampling
