# SPDX-License-Identifier: Apache-2.0
"""The one exception that means: what was given is wrong, and the message says what and how to go
on.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Input that cannot be used. The message is one line for a person: the thing, the numbers, the
    way out.
    """


def nearest(name: str, known: Iterable[str], what: str) -> InputError:
    """The error for a name that is not in a table: says the nearest names, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(names)}"
    return InputError(f"unknown {what} {name!r}; {hint}")
