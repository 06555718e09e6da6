# SPDX-License-Identifier: Apache-2.0
"""Attention of a few new tokens to keys and values that are stored in codes."""

from .api import KV_ATTENTION as KV_ATTENTION
from .api import kv_attention as kv_attention
from .reference import decoded as decoded
from .request import AttentionRequest as AttentionRequest
from .request import Stored as Stored
