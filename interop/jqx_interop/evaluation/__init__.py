# SPDX-License-Identifier: Apache-2.0
"""How well a checkpoint predicts a text, and how far its predictions are from a reference's."""

from .cost import Forecast as Forecast
from .cost import forecast as forecast
from .result import Evaluation as Evaluation
from .settings import EvalSettings as EvalSettings
from .task import Task as Task
from .task import evaluate as evaluate
from .task import prepare as prepare
from .task import run as run
from .task import scores as scores
