# SPDX-License-Identifier: Apache-2.0
"""What is reduced from activations, and how an amax and a scale come of it."""

from .kv import AffineKV as AffineKV
from .kv import affine_fold as affine_fold
from .kv import affine_start as affine_start
from .kv import kv_scale as kv_scale
from .max import input_amax as input_amax
from .max import never_met as never_met
from .max import unified as unified
from .reductions import amax as amax
from .reductions import finite_amax as finite_amax
from .reductions import input_scale as input_scale
from .reductions import stored_amax as stored_amax
