# SPDX-License-Identifier: Apache-2.0
"""Which globs are about a path, by definition."""

import fnmatch

from hypothesis import example, given, settings
from hypothesis import strategies as st

from jqx.globs import covers

PIECES = st.lists(st.sampled_from(["a", "b", "ab", ".", "*", "?", "[ab]", "layers", "1", "11"]))


@settings(max_examples=2000, deadline=None)
@given(PIECES, st.lists(st.sampled_from(["a", "b", "ab", "layers", "1", "11"]), min_size=1))
@example(["*", "a", "*", "b"], ["ab", "a", "b", "a"])
def test_a_glob_covers_what_is_around_a_path(glob, parts):
    """By definition: it matches one of the paths that end at a dot."""
    pattern = "".join(glob)
    around = [".".join(parts[: i + 1]) for i in range(len(parts))]
    wanted = any(fnmatch.fnmatchcase(name, pattern) for name in around)
    assert covers(pattern, ".".join(parts)) == wanted
