# SPDX-License-Identifier: Apache-2.0
"""The command line: `jqx`."""

from .app import main as main
from .app import program as program
