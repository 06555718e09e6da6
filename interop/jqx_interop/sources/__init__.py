# SPDX-License-Identifier: Apache-2.0
"""Quantized sources: checkpoints whose weights are decoded when they are read."""

from .decoding import DecodedCheckpoint as DecodedCheckpoint
from .decoding import as_floats as as_floats
from .decoding import title_of as title_of
from .decoding import without_description as without_description
from .table import SOURCES as SOURCES
from .table import SourceLayout as SourceLayout
from .weight import Weight as Weight
