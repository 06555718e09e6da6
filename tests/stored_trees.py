# SPDX-License-Identifier: Apache-2.0
"""What the reference tool exported, as trees in memory: the drawn checkpoints stored by the
definitions in reference.py, with the recorded scales of activations.
"""

import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import exports
import jax.numpy as jnp
import numpy as np
import reference
from exports import EXPORTS, Export

import jqx
from jqx.config import KV_FORMATS, Choice, resolve
from jqx.formats import FORMATS, grid_shape
from jqx.models.linen import CausalLM
from jqx.tensors import QTensor
from jqx.tensors.paths import unflatten
from jqx_interop.families import spec_from_config
from jqx_interop.model import Model
from jqx_interop.recipe_files import read_recipe

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
STATIC = {"fp8", "int8", "nvfp4"}  # input formats whose scale is stored
SOME = ("qwen2-mxfp8-none-100KB", "llama_f16-fp8-none-10GB")
ROWS = [row for row in EXPORTS if row.model in ("llama", "wide") or row.key in SOME]
ROWS += [row for row in EXPORTS if row.model == "llama_f32" and row.recipe in ("fp8", "mxfp4")]


@cache
def recipe_of(name: str) -> jqx.Recipe:
    if name != "mixed":
        return jqx.RECIPES[name]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mixed.yaml").write_text(exports.MIXED)
        return read_recipe(Path(folder) / "mixed.yaml")


def choice_of(row: Export, path: str) -> Choice:
    """What the recipe says about one module."""
    kind = "embedding" if path.endswith("embed_tokens") else "linear"
    return resolve(recipe_of(row.recipe).config, f"{path}.weight", kind)


@cache
def drawn(model: str) -> dict[str, np.ndarray]:
    return exports.tensors(model)


def amax_of(row: Export, path: str) -> float | None:
    """The largest weight among linears that share a tensor scale, None without one."""
    parent, _, name = path.rpartition(".")
    if FORMATS[choice_of(row, path).weight].tensor_bound is None:
        return None
    group = next((group for group in GROUPS if name in group), (name,))
    members = [f"{parent}.{twin}.weight" for twin in group]
    return max(float(np.abs(drawn(row.model)[name]).max()) for name in members)


@cache
def _encoded(model: str, path: str, fmt: str, amax: float | None) -> tuple[Any, ...]:
    return reference.encode(drawn(model)[f"{path}.weight"], fmt, amax)


def linear(row: Export, path: str) -> QTensor:
    """One quantized linear, its input_scale as recorded."""
    choice, w = choice_of(row, path), drawn(row.model)[f"{path}.weight"]
    fmt = FORMATS[choice.weight]
    codes, scale, tensor_scale = _encoded(row.model, path, fmt.name, amax_of(row, path))
    if fmt.scale.name == "e4m3":
        scale = scale.view(jnp.float8_e4m3fn)
    recorded = exports.answers()["exports"][row.key].get("calibrated", {})
    found = recorded.get(f"{path}.input_scale")
    assert (found is None) == (choice.input not in STATIC or row.recipe == "w4a8_mxfp4_fp8")
    return QTensor(
        codes=jnp.asarray(codes.view(jnp.dtype(fmt.element.dtype))),
        scale=jnp.asarray(scale.reshape(grid_shape(fmt, w.shape))),
        tensor_scale=None if tensor_scale is None else jnp.float32(tensor_scale),
        format=fmt,
        dtype=jnp.dtype(w.dtype),
        input_scale=None if found is None else jnp.float32(found[0]),
        input_format=choice.input,
    )


def leaves(row: Export) -> dict[str, Any]:
    """Every leaf of the export by name."""
    found: dict[str, Any] = {}
    for name, array in drawn(row.model).items():
        path, _, leaf = name.rpartition(".")
        quantized = array.ndim == 2 and choice_of(row, path).weight is not None
        found[name] = linear(row, path) if quantized else jnp.asarray(array)
    config = exports.MODELS[row.model]
    heads, width = config["num_key_value_heads"], config["hidden_size"]
    shape = (1, heads, 1, width // config["num_attention_heads"])
    for name, values in exports.answers()["exports"][row.key].get("calibrated", {}).items():
        if name.endswith(("k_scale", "v_scale")):
            found[name] = jnp.float32(values[0])
        elif name.endswith("_bias"):
            found[name] = jnp.asarray(values, exports.DTYPES[config["dtype"]]).reshape(shape)
    return found


def model_of(row: Export, path: Path | None = None) -> Model:
    """The export as a model in memory, which came from the directory `path`."""
    config = json.loads(exports.answers()["models"][row.model]["files"]["config.json"])
    kv = None if row.kv == "none" else KV_FORMATS[row.kv].name
    spec = replace(spec_from_config(config), kv_cache=kv)
    return Model(params=unflatten(leaves(row)), module=CausalLM(spec), config=config, path=path)
