# SPDX-License-Identifier: Apache-2.0
"""Views: where each element of a rearranged parameter lies in it."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jqx.transforms import views


@st.composite
def rearrangements(draw):
    """A shape, and steps of numpy that rearrange an array of it."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3))
    steps, current = [], list(shape)
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            order = draw(st.permutations(range(len(current))))
            steps.append(("transpose", tuple(order)))
            current = [current[i] for i in order]
        else:
            size, new = math.prod(current), []
            while size > 1:
                new.append(draw(st.sampled_from([d for d in range(2, size + 1) if size % d == 0])))
                size //= new[-1]
            steps.append(("reshape", tuple(new)))
            current = new
    return shape, steps


@given(rearrangements())
def test_a_view_says_where_each_of_its_elements_lies(case):
    shape, steps = case
    data = np.arange(math.prod(shape)).reshape(shape)
    axes = views.parameter("w", shape).axes
    step = {"transpose": views.transposed, "reshape": views.reshaped}
    for name, argument in steps:
        data = getattr(np, name)(data, argument)
        axes = step[name](axes, argument)
        if axes is None:  # no box of the parameter any more: nothing is claimed
            return
    for index in np.ndindex(data.shape):
        place = dict.fromkeys(range(len(shape)), 0)
        for i, pieces in zip(index, axes, strict=True):
            sizes = [p.size for p in pieces]
            for piece, j in zip(pieces, np.unravel_index(i, sizes) if sizes else (), strict=True):
                place[piece.axis] += int(j) * piece.stride
        assert np.ravel_multi_index(tuple(place.values()), shape) == data[index]


def test_a_reshape_that_cuts_across_axes_is_not_a_view():
    axes = views.parameter("w", (4, 6)).axes
    assert views.reshaped(axes, (6, 4)) is None
    assert views.reshaped(axes, (2, 12)) is not None
