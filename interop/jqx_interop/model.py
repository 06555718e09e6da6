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

from .compressing import read_compressed
from .stored import open_model, read_params


@dataclass(frozen=True, kw_only=True)
class Model:
    """`params`: nested dict whose paths are the tensor names, QTensors where weights are quantized;
    `module`: a Linen module; `config`: config.json; `path`: the directory it came from, if any.
    """

    params: dict[str, Any]
    module: CausalLM
    config: dict[str, Any]
    path: Path | None = None

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


def load(model: str | Path, quantize: Any = None) -> Model:
    """Read a whole checkpoint into memory, in the dtype its configuration names.

    Quantized weights stay as they are stored, and run as their formats say. With `quantize` (the
    name of a recipe, a recipe file or a configuration) a checkpoint is compressed while it is read,
    so that the full-precision model is never in memory; scales of inputs are found in each
    activation until `jqx.calibrate` and `jqx.quantize` give them. Experts that lie in one tensor
    are stacks then, `experts.{}.up_proj.weight`, as they are in what `ptq` writes.

    Raises InputError for what cannot be read: see `open_model`; with `quantize` also for a recipe
    that needs calibration data.
    """
    if quantize is None:
        source = open_model(model)
        params = read_params(source, param_shapes(source.spec))
    else:
        source, params = read_compressed(model, quantize)
    return Model(
        params=params,
        module=CausalLM(source.spec),
        config=source.checkpoint.config,
        path=source.checkpoint.path,
    )
