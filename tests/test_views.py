# SPDX-License-Identifier: Apache-2.0
"""Views: where each element of a rearranged parameter lies in it."""

import math

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jqx.transforms import views


@st.composite
def rearrangements(draw):
    """A shape, and steps that rearrange an array of it."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3))
    steps, current = [], list(shape)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["transposed", "reshaped", "sliced", "squeezed", "broadcast"]))
        argument, current = draw(STEPS[kind](current))
        steps.append((kind, argument))
    return shape, steps


@st.composite
def transposes(draw, shape):
    order = draw(st.permutations(range(len(shape))))
    return (tuple(order),), [shape[i] for i in order]


@st.composite
def reshapes(draw, shape):
    size, new = math.prod(shape), []
    while size > 1:
        new.append(draw(st.sampled_from([d for d in range(2, size + 1) if size % d == 0])))
        size //= new[-1]
    return (tuple(new),), new


@st.composite
def slices(draw, shape):
    starts = [draw(st.integers(0, n - 1)) for n in shape]
    steps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in shape]
    room = [-(-(n - a) // s) for n, a, s in zip(shape, starts, steps, strict=True)]
    sizes = [draw(st.integers(1, n)) for n in room]
    return (starts, sizes, steps), sizes


@st.composite
def squeezes(draw, shape):
    ones = [i for i, n in enumerate(shape) if n == 1]
    gone = [i for i in ones if draw(st.booleans())]
    return (tuple(gone),), [n for i, n in enumerate(shape) if i not in gone]


@st.composite
def broadcasts(draw, shape):
    at = draw(st.integers(0, len(shape)))
    new = [*shape[:at], draw(st.integers(1, 3)), *shape[at:]]
    kept = [i for i in range(len(new)) if i != at]
    for i in kept:
        if new[i] == 1:
            new[i] = draw(st.integers(1, 2))
    return (tuple(new), tuple(kept)), new


STEPS = {
    "transposed": transposes,
    "reshaped": reshapes,
    "sliced": slices,
    "squeezed": squeezes,
    "broadcast": broadcasts,
}


def cut(x, starts, sizes, steps):
    stops = [a + (n - 1) * s + 1 for a, n, s in zip(starts, sizes, steps, strict=True)]
    return jax.lax.slice(x, starts, stops, steps)


DONE = {
    "transposed": np.transpose,
    "reshaped": np.reshape,
    "sliced": cut,
    "squeezed": np.squeeze,
    "broadcast": jax.lax.broadcast_in_dim,
}


def place(view, index):
    """Where element `index` of a view lies, by the definition of pieces."""
    at = dict.fromkeys(range(len(view.shape)), 0)
    for i, pieces in zip(index, view.axes, strict=True):
        sizes = [p.size for p in pieces]
        for piece, j in zip(pieces, np.unravel_index(i, sizes) if sizes else (), strict=True):
            if piece.axis != views.NOWHERE:
                at[piece.axis] += piece.offset + int(j) * piece.stride
    for piece in view.fixed:
        at[piece.axis] += piece.offset
    return tuple(at.values())


@given(rearrangements())
def test_a_view_says_where_each_of_its_elements_lies(case):
    shape, steps = case
    data = np.arange(math.prod(shape)).reshape(shape)
    view = views.parameter("w", shape).view
    for name, arguments in steps:
        data = np.asarray(DONE[name](data, *arguments))
        view = getattr(views, name)(view, *arguments)
        if view is None:  # no box of the parameter any more: nothing is claimed
            return
    for index in np.ndindex(data.shape):
        assert np.ravel_multi_index(place(view, index), shape) == data[index]


def test_a_reshape_that_cuts_across_axes_is_not_a_view():
    view = views.parameter("w", (4, 6)).view
    assert views.reshaped(view, (6, 4)) is None
    assert views.reshaped(view, (2, 12)) is not None


def test_a_slice_that_cuts_across_rows_is_not_a_view():
    flat = views.reshaped(views.parameter("w", (4, 6)).view, (24,))
    for start, size, there in ((6, 12, True), (8, 3, True), (5, 2, False), (6, 7, False)):
        assert (views.sliced(flat, [start], [size], [1]) is not None) == there


def test_a_number_that_the_program_finds_out_leaves_a_jit():
    def chosen(i):
        view = views.sliced(views.parameter("w", (4, 6)).view, [i, 0], [1, 6], [1, 1])
        return views.viewed(views.squeezed(view, [0]))

    origin = jax.jit(chosen)(np.int32(3))
    assert [int(p.offset) for p in origin.view.fixed] == [3]
    assert origin.paths == {"w"}
    assert origin.rank == 1
