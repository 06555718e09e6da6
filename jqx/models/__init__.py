# SPDX-License-Identifier: Apache-2.0
"""Decoders as data and pure functions: the spec, where parameters lie, and the arithmetic.

The Flax module of a decoder is in `jqx.models.linen`; only that file imports Flax, which is slow.
"""

from .decoder import block as block
from .decoder import cached_block as cached_block
from .decoder import embed as embed
from .decoder import forward as forward
from .decoder import head as head
from .decoder import positions_of as positions_of
from .decoder import project_kv as project_kv
from .layers import GAIN_OFFSETS as GAIN_OFFSETS
from .layout import Shared as Shared
from .layout import block_prefix as block_prefix
from .layout import block_shapes as block_shapes
from .layout import input_groups as input_groups
from .layout import is_ignored as is_ignored
from .layout import kinds as kinds
from .layout import linears as linears
from .layout import norm_readers as norm_readers
from .layout import param_shapes as param_shapes
from .layout import row_feeders as row_feeders
from .layout import value_reader as value_reader
from .spec import BF16 as BF16
from .spec import COMPUTES as COMPUTES
from .spec import FLOAT32 as FLOAT32
from .spec import Attention as Attention
from .spec import BlockKind as BlockKind
from .spec import Compute as Compute
from .spec import Mlp as Mlp
from .spec import ModelSpec as ModelSpec
from .spec import Names as Names
from .spec import Norm as Norm
from .spec import Rope as Rope
