# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk: reading safetensors, writing them, and runs that survive a kill."""

from .checks import check_tensors as check_tensors
from .checks import digest as digest
from .checks import model_dtype as model_dtype
from .checks import small_files as small_files
from .journal import Journal as Journal
from .layout import DTYPES as DTYPES
from .layout import TensorInfo as TensorInfo
from .layout import dtype_name as dtype_name
from .mapped import MappedTensors as MappedTensors
from .problems import one_line as one_line
from .problems import refuse as refuse
from .problems import told as told
from .read import Checkpoint as Checkpoint
from .read import open_checkpoint as open_checkpoint
from .read import read_beside as read_beside
from .resolve import BUNDLED as BUNDLED
from .resolve import bundled_model as bundled_model
from .resolve import resolve_model as resolve_model
from .shards import ShardPlan as ShardPlan
from .shards import TensorOut as TensorOut
from .shards import index_json as index_json
from .shards import parse_size as parse_size
from .shards import plan_file as plan_file
from .shards import plan_shards as plan_shards
from .workspace import Workspace as Workspace
from .write import Part as Part
from .write import ShardWriter as ShardWriter
from .write import allocate as allocate
