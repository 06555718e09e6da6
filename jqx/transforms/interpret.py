# SPDX-License-Identifier: Apache-2.0
"""The jaxpr walker: run any function of parameters, and act where a parameter meets an activation.

The function is traced once; its equations are evaluated one after another, and every value carries
its `Origin`. What an equation does to origins, and where a meeting is noticed, is a rule in a table
(`primitives.PRIMITIVES`). Equations without a rule are evaluated as they are (`plain`): parameters
that go in do not come out as views, and nothing that was a matrix disappears without a trace. The
words used for that:

- *use*: a product with a matrix ("dot", "ragged_dot", "conv"), a lookup of rows ("gather"), or an
  "elementwise" meeting: a parameter added to or subtracted from an activation (a bias, a table of
  positions), or one of rank at most 1 in any other operation (a norm's gain). Rank counts axes
  longer than one.
- *untracked*: a parameter that meets an activation in any other way, on any path: changed first
  (scaled, padded, multiplied with another parameter) and then in a matrix product; of rank 2 or
  more in an operation that has no rule; or inside a construct that is not walked. A parameter can
  have uses and be untracked too. One that meets no activation at all is neither.

A value computed from constants alone is no activation, unless the function has no inputs but the
parameters: then the constants are its batch.

A parameter may be a QTensor (`Walk.stored`): the function is traced with the array it stands for,
and it is decoded where an equation reads it. Nested jit, remat and scan take it as it is, so of a
stack that is taken apart one member at a time is decoded.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jqx.errors import InputError
from jqx.tensors import QTensor
from jqx.tensors.paths import leaf_names

from .decoding import decoded_after, dense
from .entries import Entry, merged, ordered
from .rearrange import STORED, arranged
from .views import ACTIVATION, CONSTANT, Origin, Pieces, View, derived, parameter


@dataclass(frozen=True, slots=True)
class Use:
    """One way in which a parameter meets an activation, or a named activation.

    `path` is the parameter's name, or the name given to `checkpoint_name`. `op` is "dot",
    "ragged_dot", "conv", "gather", "elementwise" or "name". For products `activation_axes` are the
    activation's axes that are summed over, in the order of the parameter's channels (of a
    convolution the axis of its features), and `weight_axes` the parameter's. For "gather"
    `weight_axes` is the axis that is looked up and the activation is the array of indices.
    `stack_axes` are the parameter's axes along which one member at a time is used: scanned,
    indexed, or a batch dimension of the product. All axes of a parameter are those of the leaf in
    the tree.
    """

    path: str
    op: str
    activation_axes: tuple[int, ...] = ()
    weight_axes: tuple[int, ...] = ()
    stack_axes: tuple[int, ...] = ()


class Met(NamedTuple):
    """A use with its arrays.

    `apply(x, w)` evaluates the operation on the activation and the parameter (None for a name),
    each in its right place. `active`: whether `x` depends on the inputs; a constant may turn a
    weight. `view`: how `w` lies in the parameter. `batch`: the axes of `x` that meet a member each,
    and the pieces of the parameter they run over. `groups`: of a ragged_dot, how many rows of `x`
    meet each member, which lie one after another along the axis `ragged`. `summed`: the pieces of
    the parameter that each of `use.activation_axes` runs over. `first`: of a dot, whether the
    parameter is the first operand; `stored`: what `w` was decoded from, if anything.
    """

    use: Use
    x: Any
    w: Any
    apply: Callable[[Any, Any], Any]
    active: bool
    view: View | None = None
    batch: tuple[tuple[int, Pieces], ...] = ()
    groups: Any = None
    ragged: int = 0
    summed: tuple[Pieces, ...] = ()
    first: bool = False
    stored: QTensor | None = None

    @property
    def whole(self) -> bool:
        """Whether `w` is all of the parameter."""
        sizes = [p.size for dim in self.view.axes for p in dim] if self.view else [0]
        return self.view is not None and prod(sizes) == prod(self.view.shape)


class Value(NamedTuple):
    """An array, its tracer, or the QTensor that holds it, and where it comes from. `stored`: the
    QTensor that the array was decoded from, if any.
    """

    data: Any
    origin: Origin
    stored: QTensor | None = None


PRODUCTS = ("dot", "ragged_dot", "conv")
"""The ops of uses that are products."""

Rule = Callable[["Walk", Any, list[Value]], list[Value]]


class Output(NamedTuple):
    """The result of one product, and how often the scans around it are run, outermost first; None
    for a loop whose length only the running program knows.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    loops: tuple[int | None, ...]


@dataclass(frozen=True)
class Record:
    """What tracing alone tells, in the order of first meeting (dicts serve as ordered sets)."""

    uses: dict[Use, None] = field(default_factory=dict)
    untracked: dict[str, None] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)

    def add(self, other: "Record") -> None:
        """Everything that `other` tells as well."""
        self.uses.update(other.uses)
        self.untracked.update(other.untracked)
        self.outputs.extend(other.outputs)


@dataclass(frozen=True)
class Acts:
    """What a transform does at a meeting. `change` returns what stands in for the result, or None:
    the operation as it is. `collect` returns an Entry of what it keeps, or None. Entries of one
    path are combined with `merge`, a function of two of what they keep, for which `neutral` counts
    as nothing.
    """

    change: "Callable[[Met, Walk], Any] | None" = None
    collect: "Callable[[Met, Walk], Entry | None] | None" = None
    merge: Callable[[Any, Any], Any] = partial(jax.tree.map, jnp.maximum)
    neutral: float | int = 0


@dataclass(frozen=True)
class Walk:
    """One pass over one jaxpr. `found` is what was collected in it so far, by path; `stored` are
    the parameters that are QTensors. `loops` are the lengths of the scans around it, `stacks` the
    depths of those that take parameters apart. `given` are arrays for the products to come, by
    path, which `probe` adds. `beside` is what `change` knows of parameters, a pytree by path: what
    is outside of a shard_map cannot be used in it, so it goes in with the operands.
    """

    rules: Mapping[str, Rule]
    acts: Acts = Acts()
    record: Record = field(default_factory=Record)
    found: dict[str, Entry] = field(default_factory=dict)
    stored: Mapping[str, QTensor] = field(default_factory=dict)
    loops: tuple[int | None, ...] = ()
    stacks: tuple[int, ...] = ()
    given: dict[str, list[Any]] | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)

    def inner(self, **changes: Any) -> "Walk":
        """A walk over an inner jaxpr: it collects by itself and shares the record."""
        return replace(self, found={}, **changes)

    def dry(self) -> "Walk":
        """A walk that only finds out what there is inside a construct."""
        return replace(self, found={}, record=Record(), acts=Acts(), given=None)

    def run(self, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value]) -> list[Value]:
        """Evaluate a jaxpr; what its variables are bound to carries an origin, and so do the
        results.
        """
        env: dict[Any, Value] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        latest = next((v.data for v in args if _orders(v)), None)

        def read(atom: Any) -> Value:
            return Value(atom.val, CONSTANT) if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            ins = [read(atom) for atom in eqn.invars]
            with eqn.ctx.manager:
                outs = _still_stored(eqn, ins) or self._evaluated(eqn, ins, latest)
            env.update(zip(eqn.outvars, outs, strict=True))
            latest = next(filter(_orders, outs), Value(latest, CONSTANT)).data
        return [read(atom) for atom in jaxpr.outvars]

    def _evaluated(self, eqn: Any, ins: list[Value], latest: Any) -> list[Value]:
        """The results of an equation; operands are decoded unless it has a jaxpr inside."""
        stored = any(isinstance(v.data, QTensor) for v in ins)
        if stored and not any(True for _ in jex.jaxprs_in_params(eqn.params)):
            ins = [_decoded(v, latest) for v in ins]
        return self.rules.get(eqn.primitive.name, plain)(self, eqn, ins)

    def meet(self, met: Met) -> Any:
        """Record a use, act on it, and keep what is collected."""
        out = self.acts.change(met, self) if self.acts.change else None
        out = met.apply(met.x, met.w) if out is None else out
        self.note(met, out)
        return out

    def note(self, met: Met, out: Any) -> None:
        """Record a use whose result is `out`, and keep what is collected."""
        self.record.uses.setdefault(met.use)
        if met.use.op in PRODUCTS:
            self.record.outputs.append(Output(met.use.path, out.shape, out.dtype, self.loops))
        entry = self.acts.collect(met, self) if self.acts.collect else None
        if entry is not None and jax.tree.leaves(entry.what):
            self.keep(met.use.path, entry)

    def keep(self, path: str, entry: Entry) -> None:
        """Keep an entry, merged with what the path already has."""
        if path in self.found:
            entry = merged(self.acts.merge, path, self.found[path], entry)
        self.found[path] = entry

    def escape(self, values: Sequence[Value], rank: int) -> None:
        """Parameters among `values` enter an operation: up to `rank` an elementwise use, above it
        untracked.
        """
        for value in values:
            for path in sorted(value.origin.paths):
                if value.origin.rank <= rank:
                    self.record.uses.setdefault(Use(path, "elementwise"))
                else:
                    self.record.untracked.setdefault(path)


def _decoded(value: Value, latest: Any) -> Value:
    """The array that is stored in `value`, with what it was decoded from."""
    if not isinstance(value.data, QTensor):
        return value
    return Value(decoded_after(latest, value.data), value.origin, value.data)


def _orders(value: Value) -> bool:
    x = value.data
    return value.origin.active and jnp.issubdtype(x.dtype, jnp.floating) and x.size > 0


def _still_stored(eqn: Any, ins: list[Value]) -> list[Value] | None:
    """The result of rearranging a stored parameter, still stored; None where that cannot be."""
    name = eqn.primitive.name
    if name not in STORED or not isinstance(ins[0].data, QTensor):
        return None
    others = [v.data for v in ins[1:]]
    q = STORED[name](ins[0].data, eqn, others)
    return None if q is None else [Value(q, arranged(ins[0].origin, eqn, others))]


def evaluate(eqn: Any, data: Sequence[Any]) -> list[Any]:
    """The results of one equation on these operands."""
    data = [dense(x) for x in data]
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)
    outs = eqn.primitive.bind(*functions, *data, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


def plain(walk: Walk, eqn: Any, ins: list[Value], rank: int = 1) -> list[Value]:
    """The rule of an operation without a rule: parameters of at most this rank may meet an
    activation in it.

    A construct that has a jaxpr inside may hide any use, so no parameter at all may enter it, and
    the names in it are untracked too.
    """
    outs = evaluate(eqn, [v.data for v in ins])
    for inner in names_inside(eqn):
        walk.record.untracked.setdefault(inner)
    if any(v.origin.active for v in ins):
        hidden = any(True for _ in jex.jaxprs_in_params(eqn.params))
        walk.escape(ins, -1 if hidden else rank)
        return [Value(x, ACTIVATION) for x in outs]
    return [Value(x, derived((v.origin for v in ins), np.shape(x))) for x in outs]


def names_inside(eqn: Any) -> list[str]:
    """Names given to values anywhere inside a construct."""
    inner = [e for jaxpr in jex.jaxprs_in_params(eqn.params) for e in jaxpr.eqns]
    own = [e.params["name"] for e in inner if e.primitive.name == "name"]
    return own + [name for e in inner for name in names_inside(e)]


def arrays_of(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The leaves of `tree` that are arrays, and the function that puts others in their place and
    keeps the rest.
    """
    leaves, structure = jax.tree.flatten(tree)
    held = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]

    def rebuild(arrays: Sequence[Any]) -> Any:
        it = iter(arrays)
        return structure.unflatten(
            [next(it) if h else x for x, h in zip(leaves, held, strict=True)]
        )

    return [x for x, h in zip(leaves, held, strict=True) if h], rebuild


def interpret(
    f: Callable[..., Any],
    walk: Walk,
    params: Any,
    args: Sequence[Any],
    followed: Container[str] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """`f(params, *args)` evaluated by `walk`, and what was collected on the way, by path.

    `followed`: the paths of the parameters that count as such (None: all); others are constants. In
    place of what `walk.stored` holds, `params` has ShapeDtypeStructs. Leaves of `params` and `args`
    that are no arrays (a flag, a function kept in a module) stay what they are.

    Raises InputError if two leaves have one name.
    """
    arrays, rebuild = arrays_of((params, tuple(args)))
    mine = named_arrays(params)
    outside = CONSTANT if len(arrays) > len(mine) else ACTIVATION

    def flat(*xs: Any) -> Any:
        p, a = rebuild(xs)
        return f(p, *a)

    def bound(name: str, x: Any) -> Value:
        origin = followed is None or name in followed
        return Value(walk.stored.get(name, x), parameter(name, x.shape) if origin else CONSTANT)

    closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*arrays)
    ins = [bound(name, x) for name, x in mine.items()]
    ins += [Value(x, ACTIVATION) for x in arrays[len(mine) :]]
    outs = walk.run(closed.jaxpr, [Value(c, outside) for c in closed.consts], ins)
    found = [dense(v.data) for v in outs]
    collected = {path: ordered(entry) for path, entry in walk.found.items()}
    return jax.tree.unflatten(jax.tree.structure(shapes), found), collected


def named_arrays(params: Any) -> dict[str, Any]:
    """The leaves that are arrays, by name, in the order of the tree. Raises InputError if two have
    one name.
    """
    pairs = zip(leaf_names(params), jax.tree.leaves(params), strict=True)
    found: dict[str, Any] = {}
    for name, x in pairs:
        if arrays_of(x)[0]:
            if name in found:
                raise InputError(f"two parameters are called {name}: rename one of them")
            found[name] = x
    return found
