# SPDX-License-Identifier: Apache-2.0
"""The architecture of a checkpoint: what its configuration describes, and what its tensors add."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from jqx.errors import InputError
from jqx.models import ModelSpec, apart, is_fused, named_as

from .checkpoints import Checkpoint
from .experts import linears_of_experts
from .families import spec_from_config
from .inventory import same_tensor


def optional_tensors(spec: ModelSpec) -> tuple[str, ...]:
    """Globs of tensors a checkpoint may hold although they are no parameters."""
    head = (f"{spec.names.head}.weight",) if spec.tied else ()
    return (*spec.names.buffers, *spec.names.carried, *head)


def spec_for(config: Mapping[str, Any], tensors: Collection[str]) -> ModelSpec:
    """What a configuration describes, with the names that these tensors have; experts that usually
    lie in one tensor may have tensors of their own.
    """
    spec = together_for(config, tensors)
    if any(is_fused(kind) for kind in spec.blocks):
        separate = apart(spec)
        if linears_of_experts(separate) & {name.rpartition(".")[0] for name in tensors}:
            return separate
    return spec


def together_for(config: Mapping[str, Any], tensors: Collection[str]) -> ModelSpec:
    """The same, with experts in one tensor where that is usual."""
    return named_as(spec_from_config(config), tensors)


def spec_of(checkpoint: Checkpoint, *, must: bool) -> ModelSpec | None:
    """What the configuration describes; None if that is not defined here and need not be."""
    try:
        return spec_for(checkpoint.config, checkpoint.tensors)
    except InputError as error:
        if must:
            raise InputError(f"{checkpoint.path}: {error}") from error
        return None


def own_head(checkpoint: Checkpoint, spec: ModelSpec) -> ModelSpec:
    """`spec`, untied where a tied model ships a head that differs: the one reading of weights."""
    head, table = f"{spec.names.head}.weight", f"{spec.names.embed}.weight"
    if not spec.tied or head not in checkpoint.tensors or same_tensor(checkpoint, head, table):
        return spec
    return dataclasses.replace(spec, tied=False)
