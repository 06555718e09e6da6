# SPDX-License-Identifier: Apache-2.0
"""A model in one piece, for the definitions of scores of its linears. Imported by the tests."""

from functools import partial

import jax
import jax.numpy as jnp
from damage import arrays

import jqx_interop as ji
from jqx.algorithms.simulate import simulate
from jqx.formats import find_format
from jqx.models import forward, transposed_linears
from jqx.transforms import observe, probe, probes


@partial(jax.jit, static_argnames=("kind",))
def change_of(x, w, most, *, kind):
    """What becomes different in outputs as ModelOpt simulates them."""
    fmt = find_format(kind)
    bounds = (most, None) if kind == "fp8" else (None, most)
    rounded = simulate(x.astype(w.dtype), fmt, *bounds), simulate(w, fmt)
    product = lambda x, w: x.astype(jnp.float32) @ w.astype(jnp.float32).T  # noqa: E731
    return product(*rounded) - product(x, w)


class Whole:
    """The model in one piece: logits, inputs of linears, and what they change."""

    def __init__(self, model, ids, groups):
        self.loaded, self.ids, self.tensors = ji.load(model), ids, arrays(model)
        self.transposed = transposed_linears(self.loaded.spec)
        self.names = [f"{path}.weight" for group in groups for path in group]
        keep = lambda use, x: x if use.op == "dot" and use.path in self.names else None  # noqa: E731
        met = jax.jit(observe(self.logits, keep, merge=lambda a, b: a))
        self.log_p = jax.jit(lambda *args: jax.nn.log_softmax(probe(self.logits)(*args)))
        self.inputs = [met(self.loaded.params, batch)[1] for batch in ids]

    def logits(self, params, ids):
        return forward(self.loaded.spec, params, ids)

    def added(self, number):
        return probes(self.logits, self.loaded.params, self.ids[number], paths=self.names)

    def change(self, number, path, kind):
        """What becomes different in the outputs of one linear, as its probe lies."""
        name = f"{path}.weight"
        w = jnp.asarray(self.tensors[name])
        w = w.T if path in self.transposed else w
        most = max(float(jnp.max(jnp.abs(part[name].astype(w.dtype)))) for part in self.inputs)
        x = self.inputs[number][name].reshape(-1, w.shape[1])
        return change_of(x, w, jnp.float32(most), kind=kind)

    def probed(self, number, changes):
        added = dict(self.added(number))
        for path, change in changes.items():
            name = f"{path}.weight"
            added[name] = (change.reshape(added[name][0].shape),)
        return self.log_p(self.loaded.params, added, self.ids[number])
