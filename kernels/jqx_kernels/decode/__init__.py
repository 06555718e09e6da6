# SPDX-License-Identifier: Apache-2.0
"""Stored codes and scales back to matrices."""

from .api import DECODE as DECODE
from .api import decode as decode
from .request import DecodeRequest as DecodeRequest
