# SPDX-License-Identifier: Apache-2.0
"""A model in one piece, for the definitions of scores of its linears. Imported by the tests."""

import itertools
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
        self.places: dict[int, dict] = {}

    def logits(self, params, ids):
        return forward(self.loaded.spec, params, ids)

    def added(self, number):
        if number not in self.places:
            params, ids = self.loaded.params, self.ids[number]
            self.places[number] = probes(self.logits, params, ids, paths=self.names)
        return self.places[number]

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

    def gradient_scores(self, groups, kinds):
        """Sums of (gradient times change)^2, and the mean loss of a batch."""

        def loss(added, ids):
            log_p = jax.nn.log_softmax(probe(self.logits)(self.loaded.params, added, ids)[:, :-1])
            return -jnp.mean(jnp.take_along_axis(log_p, ids[:, 1:, None], -1))

        run, losses = jax.jit(jax.value_and_grad(loss)), []
        scores = {group[0]: dict.fromkeys(kinds, 0.0) for group in groups}
        for number in range(len(self.ids)):
            value, g = run(self.added(number), self.ids[number])
            losses.append(float(value))
            for group, kind in itertools.product(groups, kinds):
                for path in group:
                    change = self.change(number, path, kind)
                    mine = g[f"{path}.weight"][0].reshape(change.shape)
                    scores[group[0]][kind] += float(jnp.sum(jnp.square(mine * change)))
        return scores, sum(losses) / len(losses)
