# SPDX-License-Identifier: Apache-2.0
"""AutoQuantize for checkpoints: scores by gradients or divergence, a choice under a budget, and its
export.
"""

from .choosing import Chosen as Chosen
from .choosing import Limit as Limit
from .choosing import Tried as Tried
from .choosing import chosen as chosen
from .choosing import limit_of as limit_of
from .quantize import AutoSettings as AutoSettings
from .quantize import auto_quantize as auto_quantize
from .rounds import refined as refined
from .run import METHODS as METHODS
from .run import Scored as Scored
from .run import Scoring as Scoring
from .run import scored as scored
from .ways import LATENCY as LATENCY
