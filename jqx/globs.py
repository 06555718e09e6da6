# SPDX-License-Identifier: Apache-2.0
"""Globs of paths: what one covers, and what is left of it when the end of names is known."""

import fnmatch
import re
from functools import lru_cache

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


def covers(glob: str, path: str, kind: str | None = None) -> bool:
    """Whether a rule with this glob is about `path`: it matches the path or a module around it.
    After a = it matches the module itself: that of a weight, or for the kind "attention" `path`;
    one of them where the kind is not known.
    """
    glob = glob.replace("/", ".")
    if glob.startswith("="):
        module = path.rpartition(".")[0]
        names = {"attention": (path,), None: (path, module)}.get(kind, (module,))
        return any(fnmatch.fnmatchcase(name, glob[1:]) for name in names)
    return _at_a_dot(glob).match(path) is not None


@lru_cache(maxsize=1024)
def _at_a_dot(glob: str) -> re.Pattern[str]:
    """What matches a path where `glob` matches the whole of it, or what is before one of its
    dots.
    """
    pattern = fnmatch.translate(glob)[:-2]  # without the end of the text that it asks for
    return re.compile(rf"{pattern}(?=\.|\Z)")
