# SPDX-License-Identifier: Apache-2.0
"""Engines: which of them load a checkpoint, and whether it holds together. See `verify`."""

from .engines import ALL as ALL
from .engines import ENGINES as ENGINES
from .engines import Engine as Engine
from .engines import find_engines as find_engines
from .formats import scheme_name as scheme_name
from .problem import Problem as Problem
from .verify import RULES as RULES
from .verify import FaultyOutput as FaultyOutput
from .verify import Verdict as Verdict
from .verify import Verification as Verification
from .verify import engines_for as engines_for
from .verify import verify as verify
from .verify import verify_written as verify_written
