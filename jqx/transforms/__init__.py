# SPDX-License-Identifier: Apache-2.0
"""Function transforms over the jaxpr walker: see what parameters are multiplied with, run on stored
weights, without changing the model.
"""

from .axes import Axes as Axes
from .axes import axes as axes
from .interpret import Met as Met
from .interpret import Use as Use
from .observe import observe as observe
from .observe import untracked as untracked
from .observe import uses as uses
from .probe import probe as probe
from .probe import probes as probes
from .quantized import quantized as quantized
from .stored import fake_input as fake_input
from .stored import fake_kv as fake_kv
