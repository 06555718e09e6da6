# SPDX-License-Identifier: Apache-2.0
"""Matrices to the codes and scales that store them."""

from .api import CODES as CODES
from .api import ENCODE as ENCODE
from .api import codes as codes
from .api import encode as encode
from .request import EncodeRequest as EncodeRequest
