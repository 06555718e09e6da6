# SPDX-License-Identifier: Apache-2.0
"""Models whose linears have more beside their codes than scales: drawn, not calibrated."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from exports import Export
from functions import draw
from stored_trees import GROUPS, drawn, model_of

from jqx.config import Choice
from jqx.tensors import QTensor
from jqx.tensors.paths import flatten, unflatten
from jqx_interop.model import Model

RANK = 5
PLAIN = Export(model="llama", recipe="nvfp4")
INT4 = jax.jit(lambda w: QTensor.quantize(w, "int4_fp8"))


def factor(k: int) -> jax.Array:
    """A pre_quant_scale that rounds nothing away: powers of two."""
    return jnp.exp2(jnp.round(draw(k, seed=k))).astype(jnp.bfloat16)


def pair(n: int, k: int) -> tuple[jax.Array, jax.Array]:
    """Two factors whose product is as large as a weight."""
    outer, inner = draw(n, RANK, seed=n) / 6, draw(RANK, k, seed=k) / 6
    return outer.astype(jnp.bfloat16), inner.astype(jnp.bfloat16)


def awq(path: str, q: QTensor) -> QTensor:
    """Only o_proj keeps its factor: all others are folded into what comes before."""
    return q.replace(pre_quant_scale=factor(q.shape[1])) if "o_proj" in path else q


def svd(path: str, q: QTensor) -> QTensor:
    return q.replace(pre_quant_scale=factor(q.shape[1]), low_rank=pair(*q.shape))


def w4a8(path: str, q: QTensor) -> QTensor:
    """Codes of their own, one tensor scale for those that read one input."""
    above, _, name = path.rpartition(".")
    group = next((group for group in GROUPS if name in group), (name,))
    whole = max(np.abs(drawn("llama")[f"{above}.{twin}.weight"]).max() for twin in group)
    beside: dict[str, Any] = {"pre_quant_scale": factor(q.shape[1])} if len(group) == 1 else {}
    made = INT4(jnp.asarray(drawn("llama")[f"{path}.weight"]))
    return made.replace(
        tensor_scale=jnp.float32(whole) / 448,
        input_scale=q.input_scale * 6,
        input_format="fp8",
        **beside,
    )


KINDS: dict[str, tuple[Callable[[str, QTensor], QTensor], Choice]] = {
    "NVFP4_AWQ": (awq, Choice(weight="nvfp4", input="nvfp4", variant="awq")),
    "NVFP4_SVD": (svd, Choice(weight="nvfp4", input="nvfp4", variant="svd")),
    "W4A8_AWQ": (w4a8, Choice(weight="int4_fp8", input="fp8")),
}
"""What the layout calls it -> how a linear becomes so, and what is read."""


@cache
def factored(name: str) -> Model:
    """The model in which every linear is as the row of KINDS says."""
    model, (change, _) = model_of(PLAIN), KINDS[name]
    leaves = {
        n: change(n.removesuffix(".weight"), x) if isinstance(x, QTensor) else x
        for n, x in flatten(model.params).items()
    }
    return replace(model, params=unflatten(leaves))
