# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in memory: its parameters as a Flax tree, and the module that runs them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jqx.models import ModelSpec, param_shapes
from jqx.models.linen import CausalLM
from jqx.tensors.paths import unflatten

from .checkpoints import DTYPES, check_tensors, model_dtype, open_checkpoint
from .families import spec_from_config
from .job import optional_tensors, refuse_quantized


@dataclass(frozen=True, kw_only=True)
class Model:
    """`params`: nested dict whose paths are the tensor names; `module`: a Linen module; `config`:
    config.json.
    """

    params: dict[str, Any]
    module: CausalLM
    config: dict[str, Any]

    @property
    def spec(self) -> ModelSpec:
        """Every architectural choice."""
        return self.module.spec

    @property
    def family(self) -> str:
        """The model_type."""
        return self.spec.family

    def apply(
        self, variables: dict[str, Any], ids: Int[Array | np.ndarray, "b t"]
    ) -> Float[Array, "b t v"]:
        """Float32 logits of `ids` under `variables`, {"params": tree} as Linen has it."""
        return self.module.apply(variables, jnp.asarray(ids, jnp.int32))  # pyright: ignore[reportReturnType]


def load(model: str | Path) -> Model:
    """Read a whole checkpoint into memory, in the dtype its configuration names.

    Raises InputError for what cannot be read: see `open_checkpoint`; unknown families; quantized
    checkpoints.
    """
    checkpoint = open_checkpoint(model)
    refuse_quantized(checkpoint)
    spec = spec_from_config(checkpoint.config)
    check_tensors(checkpoint, param_shapes(spec), optional_tensors(spec))
    dtype = DTYPES[model_dtype(checkpoint)]
    named = {name: jnp.asarray(checkpoint.read(name), dtype) for name in param_shapes(spec)}
    return Model(params=unflatten(named), module=CausalLM(spec), config=checkpoint.config)
