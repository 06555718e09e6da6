# SPDX-License-Identifier: Apache-2.0
"""Products of activations with a stored matrix."""

from .api import MATMUL as MATMUL
from .api import matmul as matmul
from .request import MatmulRequest as MatmulRequest
