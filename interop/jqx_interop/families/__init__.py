# SPDX-License-Identifier: Apache-2.0
"""Model families: the table of model types, and the reading of a config.json into a ModelSpec."""

from .family import Family as Family
from .from_config import context_of as context_of
from .from_config import reader_of as reader_of
from .from_config import spec_from_config as spec_from_config
from .table import FAMILIES as FAMILIES
