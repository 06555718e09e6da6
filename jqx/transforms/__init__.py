# SPDX-License-Identifier: Apache-2.0
"""Function transforms over the jaxpr walker: see what parameters are multiplied with, without
changing the model.
"""

from .interpret import Use as Use
from .observe import observe as observe
from .observe import untracked as untracked
from .observe import uses as uses
