# SPDX-License-Identifier: Apache-2.0
"""Products with the orthogonal Hadamard matrix."""

from .api import HADAMARD as HADAMARD
from .api import hadamard as hadamard
from .matrices import hadamard_matrix as hadamard_matrix
from .matrices import largest_order as largest_order
from .request import HadamardRequest as HadamardRequest
