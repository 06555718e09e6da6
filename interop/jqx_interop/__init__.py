# SPDX-License-Identifier: Apache-2.0
"""Disk and other frameworks: Hugging Face checkpoints in and out, the streaming pipeline, the
command line.
"""

from .compare import compare_checkpoints as compare_checkpoints
from .inspect import inspect_checkpoint as inspect_checkpoint
from .model import Model as Model
from .model import load as load
from .pipeline import ptq as ptq
from .report import Report as Report
from .settings import Settings as Settings
