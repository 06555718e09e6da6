# SPDX-License-Identifier: Apache-2.0
"""Globs as sets of names: what is left of one when the end of the names is known."""

import fnmatch
import re

TOKEN = re.compile(r"\*+|\[!?\]?[^\]]*\]|.", re.DOTALL)


def without_ending(glob: str, ending: str) -> tuple[str, ...]:
    """The globs that match, together, just the names X for which `glob` matches X + `ending`.

    "*.mlp.gate.*" without ".weight" is "*.mlp.gate" and "*.mlp.gate.*". None where no name that
    ends so is matched.
    """
    tokens = [("*" if token[0] == "*" else token) for token in TOKEN.findall(glob)]
    left = {len(tokens)}  # how many tokens may be left
    for letter in reversed(ending):
        left |= {i - 1 for i in left if i and tokens[i - 1] == "*"}  # a star that matches nothing
        left = {found for i in left if i for found in _before(tokens, i, letter)}
    return tuple("".join(tokens[:i]) for i in sorted(left))


def _before(tokens: list[str], i: int, letter: str) -> list[int]:
    """How many of `i` tokens are left when the last one has matched `letter`."""
    if tokens[i - 1] == "*":
        return [i]
    return [i - 1] if fnmatch.fnmatchcase(letter, tokens[i - 1]) else []
