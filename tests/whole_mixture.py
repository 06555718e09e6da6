# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts in one piece, all experts on all tokens, for the definitions of scores of
its experts. Imported by the tests.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jqx import models
from jqx.algorithms.simulate import simulate
from jqx.formats import find_format
from jqx.models import Experts, block_prefix, expert_tensors, kinds
from jqx.models.layers import ACTIVATIONS, module
from jqx.tensors.paths import unflatten
from jqx.tensors.stacks import stacked
from jqx_interop.checkpoints import open_checkpoint
from jqx_interop.families import spec_from_config
from jqx_interop.unfused import unfused

OTHER = -1  # beside the numbers of blocks, experts as they are not in the model


def inner_of(each, gate, up):
    """What lies between the linears of an expert."""
    if each.form == "gated":
        return ACTIVATIONS[each.activation](gate) * up
    if each.limit is not None:
        gate, up = jnp.minimum(gate, each.limit), jnp.clip(up, -each.limit, each.limit)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


def rounded(kind, x, most):
    """As ModelOpt simulates it, with one scale of the tensor that reaches `most`."""
    most = jnp.asarray(most, jnp.float32)
    bounds = (most, None) if kind == "fp8" else (None, most)
    return simulate(x.astype(jnp.bfloat16), find_format(kind), *bounds).astype(jnp.float32)


class WholeMixture:
    """A model of bfloat16 weights, in float32; `ids`: [batches, rows, tokens]."""

    def __init__(self, folder, ids):
        plain = open_checkpoint(folder)
        self.source, self.spec = unfused(plain, spec_from_config(plain.config))
        named = {n: jnp.asarray(self.source.read(n)) for n in models.param_shapes(self.spec)}
        self.params = unflatten(stacked(named, models.leaf_shapes(self.spec)))
        self.ids, self.kinds = jnp.asarray(ids, jnp.int32), kinds(self.spec)
        self.mixtures = [i for i, kind in enumerate(self.kinds) if isinstance(kind.mlp, Experts)]
        self.plain = {i: self.experts(i) for i in self.mixtures}
        self.run = jax.jit(self.logits, static_argnames=("kind",))
        read = [self.run(batch, self.plain)[1] for batch in self.ids]
        self.most = {
            i: [max(float(jnp.max(jnp.abs(part[i][j]))) for part in read) for j in (0, 1)]
            for i in self.mixtures
        }

    def experts(self, i):
        """[e, n, k] of gate, up and down, and their biases."""
        row, block = self.kinds[i].mlp, module(self.params, block_prefix(self.spec, i))
        named = expert_tensors(row, self.spec.names, self.spec.hidden)
        tree = {}
        for path, name in named.items():
            where, _, leaf = name.rpartition(".")
            tree[path] = module(block, where)[leaf].astype(jnp.float32)
        return tree

    def stored(self, i, kind):
        """The experts of block `i` as they would be rounded, gate and up of one with one scale."""
        tree = dict(self.plain[i])
        most = {n: jnp.max(jnp.abs(tree[f"{n}.weight"]), axis=(1, 2)) for n in ("gate", "up")}
        joint = jnp.maximum(most["gate"], most["up"])
        alone = jnp.max(jnp.abs(tree["down.weight"]), axis=(1, 2))
        for name, reach in (("gate", joint), ("up", joint), ("down", alone)):
            w = tree[f"{name}.weight"]
            tree[f"{name}.weight"] = jnp.stack(
                [rounded(kind, w[e], reach[e]) for e in range(len(w))]
            )
        return tree

    def sums(self, i, given, tree, kind=None):
        """What all experts make of all tokens, and what they read of those that are theirs; inputs
        are rounded as in the format `kind`.
        """
        row = self.kinds[i].mlp
        each = jax.nn.one_hot(given.ids, row.number)
        shares = jnp.sum(each * given.weights[:, :, None], axis=1).T[:, :, None]
        mine = jnp.any(each > 0, axis=1).T[:, :, None]

        def linear(name, x, number):
            if kind is not None:
                x = rounded(kind, x.reshape(-1, x.shape[-1]), self.most[i][number]).reshape(x.shape)
            y = jnp.einsum("etk,enk->etn", x, tree[f"{name}.weight"], precision="highest")
            return y + tree[f"{name}.bias"][:, None, :] if f"{name}.bias" in tree else y

        x = jnp.broadcast_to(given.x.astype(jnp.float32), (row.number, *given.x.shape))
        x = x * shares if row.weighs_input else x
        inner = inner_of(row.each, linear("gate", x, 0), linear("up", x, 0))
        y = linear("down", inner, 1)
        y = y if row.weighs_input else y * shares
        met = [jnp.where(mine, a, 0).astype(jnp.bfloat16) for a in (x, inner)]
        return jnp.sum(jnp.where(mine, y, 0), axis=0), met

    def logits(self, ids, trees, added=None, kind=None):
        """The logits, and by block what its experts read. `added` to the sums of experts; `kind` is
        the format of experts that are not those of the model.
        """
        h = models.embed(self.spec, self.params, ids)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        read = {}
        for i, row in enumerate(self.kinds):
            own = module(self.params, block_prefix(self.spec, i), {})
            if i not in self.mixtures:
                h = models.block(self.spec, row, own, h, positions)
                continue
            front = models.front(self.spec, row, own, h, positions)
            total, read[i] = self.sums(i, front.given, trees[i])
            if added is not None:
                total = total + added[i]
            if kind is not None and kind[0] == i:
                total = self.sums(i, front.given, trees[OTHER], kind[1])[0]
            h = models.combine(self.spec, row, own, front, total)
        return models.decoder.head(self.spec, self.params, h), read

    def changes(self, ids, others, *, kind):
        """By block: what becomes different in the sums of its experts."""
        h, found = models.embed(self.spec, self.params, ids), {}
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        for i, row in enumerate(self.kinds):
            own = module(self.params, block_prefix(self.spec, i), {})
            if i in self.mixtures:
                given = models.front(self.spec, row, own, h, positions).given
                found[i] = self.sums(i, given, others[i], kind)[0]
                found[i] -= self.sums(i, given, self.plain[i])[0]
            h = models.block(self.spec, row, own, h, positions)
        return found

    def gradients(self, loss):
        """By batch: the gradients of `loss` of log probabilities and ids to the sums, by block."""
        zeros = jnp.zeros((self.ids[0].size, self.spec.hidden), jnp.float32)

        @jax.jit
        @jax.grad
        def gradient(added, ids):
            return loss(jax.nn.log_softmax(self.logits(ids, self.plain, added)[0]), ids)

        return [gradient(dict.fromkeys(self.mixtures, zeros), ids) for ids in self.ids]

    def all_changes(self, kind):
        """By batch: what becomes different in the sums, by block."""
        others = {i: self.stored(i, kind) for i in self.mixtures}
        changes = jax.jit(self.changes, static_argnames=("kind",))
        return [changes(ids, others, kind=kind) for ids in self.ids]

    def gradient_scores(self, kind):
        """By block: the sum of (gradient * change)^2 over all batches."""

        def entropy(log_p, ids):
            return -jnp.mean(jnp.take_along_axis(log_p[:, :-1], ids[:, 1:, None], -1))

        scores = dict.fromkeys(self.mixtures, 0.0)
        for g, change in zip(self.gradients(entropy), self.all_changes(kind), strict=True):
            for i in self.mixtures:
                scores[i] += float(jnp.sum(jnp.square(g[i] * change[i])))
        return scores

    def fisher_scores(self, kind, signs, window):
        """By block: half the sum of squares of sums over windows of tokens, for the words' `signs`,
        a function of how many there are.
        """

        def drawn(log_p, ids):
            log_p = log_p[:, :-1]
            fixed = jax.lax.stop_gradient(jnp.exp(log_p / 2))
            return jnp.sum(fixed * log_p * signs(log_p.shape[-1])[None])

        scores = dict.fromkeys(self.mixtures, 0.0)
        for g, change in zip(self.gradients(drawn), self.all_changes(kind), strict=True):
            for i in self.mixtures:
                tokens = np.sum(np.asarray(g[i] * change[i]), axis=-1).reshape(self.ids[0].shape)
                for at in range(0, tokens.shape[1], window):
                    scores[i] += float(np.sum(tokens[:, at : at + window].sum(1) ** 2)) / 2
        return scores

    def divergences(self, kind):
        """By block: the sum of KL over all tokens, with the experts of that block rounded."""
        scores = dict.fromkeys(self.mixtures, 0.0)
        for i in self.mixtures:
            trees = {**self.plain, OTHER: self.stored(i, kind)}
            for ids in self.ids:
                p = jax.nn.log_softmax(self.run(ids, self.plain)[0])
                q = jax.nn.log_softmax(self.run(ids, trees, kind=(i, kind))[0])
                scores[i] += float(np.sum(np.exp(p) * (p - q)))
        return scores
