# SPDX-License-Identifier: Apache-2.0
"""Disk and other frameworks: Hugging Face checkpoints in and out, the streaming pipeline, the
command line.

Names are imported when they are first used: `load` needs Flax, which a command has no time for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .auto import AutoSettings as AutoSettings
    from .auto import Chosen as Chosen
    from .auto import Limit as Limit
    from .auto import auto_quantize as auto_quantize
    from .compare import compare_checkpoints as compare_checkpoints
    from .engines import Verdict as Verdict
    from .engines import Verification as Verification
    from .engines import engines_for as engines_for
    from .engines import verify as verify
    from .evaluation import EvalSettings as EvalSettings
    from .evaluation import Evaluation as Evaluation
    from .evaluation import evaluate as evaluate
    from .exporting import export as export
    from .generation import Completion as Completion
    from .generation import Sampling as Sampling
    from .generation import generate as generate
    from .inspect import inspect_checkpoint as inspect_checkpoint
    from .model import Model as Model
    from .model import load as load
    from .pipeline import ptq as ptq
    from .report import Report as Report
    from .rotating import rotate as rotate
    from .saving import save as save
    from .settings import Settings as Settings

_HOMES = {
    "AutoSettings": "auto",
    "auto_quantize": "auto",
    "Chosen": "auto",
    "Limit": "auto",
    "compare_checkpoints": "compare",
    "Completion": "generation",
    "EvalSettings": "evaluation",
    "Evaluation": "evaluation",
    "evaluate": "evaluation",
    "export": "exporting",
    "generate": "generation",
    "inspect_checkpoint": "inspect",
    "Model": "model",
    "load": "model",
    "ptq": "pipeline",
    "Report": "report",
    "rotate": "rotating",
    "Sampling": "generation",
    "save": "saving",
    "Settings": "settings",
    "Verdict": "engines",
    "Verification": "engines",
    "engines_for": "engines",
    "verify": "engines",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(_HOMES)
