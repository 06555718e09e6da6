# SPDX-License-Identifier: Apache-2.0
"""AutoQuantize for checkpoints: scores by gradients, a choice under a budget, and its export."""

from .candidates import COUNTINGS as COUNTINGS
from .choosing import Chosen as Chosen
from .choosing import chosen as chosen
from .quantize import Asked as Asked
from .quantize import auto_quantize as auto_quantize
from .run import Scored as Scored
from .run import scored as scored
