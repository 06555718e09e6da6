# SPDX-License-Identifier: Apache-2.0
"""Measuring which tiles are fastest on the device that is here."""

from .run import Tuning as Tuning
from .run import not_tunable as not_tunable
from .run import tune as tune
from .trials import TRIALS as TRIALS
from .trials import Trial as Trial
