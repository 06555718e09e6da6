# SPDX-License-Identifier: Apache-2.0
"""Decoders as data and pure functions: the spec, where parameters lie, and the arithmetic.

The Flax module of a decoder is in `jqx.models.linen`; only that file imports Flax, which is slow.
"""

from .apart import apart as apart
from .apart import is_fused as is_fused
from .apart import pieces as pieces
from .compute import BF16 as BF16
from .compute import COMPUTES as COMPUTES
from .compute import FLOAT32 as FLOAT32
from .compute import Compute as Compute
from .decoder import block as block
from .decoder import cached_block as cached_block
from .decoder import embed as embed
from .decoder import forward as forward
from .decoder import head as head
from .decoder import positions_of as positions_of
from .decoder import project_kv as project_kv
from .experts import Routed as Routed
from .inner import Front as Front
from .layers import GAIN_OFFSETS as GAIN_OFFSETS
from .layers import ROOT_MEAN_SQUARES as ROOT_MEAN_SQUARES
from .layout import block_leaf_shapes as block_leaf_shapes
from .layout import block_prefix as block_prefix
from .layout import block_shapes as block_shapes
from .layout import embed_tensors as embed_tensors
from .layout import expert_shapes as expert_shapes
from .layout import front_shapes as front_shapes
from .layout import head_tensors as head_tensors
from .layout import is_ignored as is_ignored
from .layout import kinds as kinds
from .layout import leaf_shapes as leaf_shapes
from .layout import named_as as named_as
from .layout import param_shapes as param_shapes
from .mixture import combine as combine
from .mixture import expert as expert
from .mixture import front as front
from .spec import LAYOUTS as LAYOUTS
from .spec import Alibi as Alibi
from .spec import Attention as Attention
from .spec import BlockKind as BlockKind
from .spec import Experts as Experts
from .spec import Latent as Latent
from .spec import Mlp as Mlp
from .spec import ModelSpec as ModelSpec
from .spec import Names as Names
from .spec import Norm as Norm
from .spec import Replaced as Replaced
from .spec import Rope as Rope
from .spec import Router as Router
from .spec import Sparse as Sparse
from .stores import STORES as STORES
from .stores import expert_tensors as expert_tensors
from .stores import member as member
from .stores import stacks as stacks
from .wiring import Shared as Shared
from .wiring import input_groups as input_groups
from .wiring import linear_shapes as linear_shapes
from .wiring import linears as linears
from .wiring import norm_readers as norm_readers
from .wiring import row_feeders as row_feeders
from .wiring import transposed_linears as transposed_linears
from .wiring import value_reader as value_reader
