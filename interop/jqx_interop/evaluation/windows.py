# SPDX-License-Identifier: Apache-2.0
"""A stream of tokens as overlapping windows, in which every token is scored once.

    window i holds tokens i * stride to i * stride + window; the last one ends with the text

A window scores the tokens that no earlier one holds, so all but those of the first have at least
window - stride tokens before them. This is the sliding window of Hugging Face's "Perplexity of
fixed-length models" (https://huggingface.co/docs/transformers/perplexity), but for the last window:
there it is shorter, here it reaches back to its full length.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int32

from jqx.errors import InputError


@dataclass(frozen=True, eq=False)
class Windows:
    """`ids` of every window, and the position in each of the first token that it scores; it scores
    all that follow too.
    """

    ids: Int32[np.ndarray, "n w"]
    first: Int[np.ndarray, " n"]

    @property
    def scored(self) -> Int[np.ndarray, " n"]:
        """How many tokens every window scores."""
        return self.ids.shape[1] - self.first

    @property
    def tokens(self) -> int:
        """How many tokens are scored in all."""
        return int(self.scored.sum())


def slide(ids: Int32[np.ndarray, " t"], window: int, stride: int) -> Windows:
    """The windows over the stream `ids`.

    The first token of the text is never scored: nothing precedes it. With a stride of a whole
    window, neither is the first token of each other window.

    Raises InputError if the stride is longer than a window or the stream shorter.
    """
    if stride > window:
        raise InputError(
            f"a stride of {stride} passes over tokens between windows of {window}; "
            f"give a stride of {window} or less"
        )
    if len(ids) < window:
        smaller = f", or a shorter window (--window {len(ids)})" if len(ids) > 1 else ""
        raise InputError(
            f"a text of {len(ids)} tokens is shorter than one window of {window}; "
            f"give a longer text{smaller}"
        )
    steps = -(-(len(ids) - window) // stride)
    starts = np.minimum(np.arange(steps + 1) * stride, len(ids) - window)
    ends = starts + window
    before = np.concatenate([[0], ends[:-1]])  # where the tokens end that are scored already
    first = np.maximum(before - starts, 1)
    return Windows(ids[starts[:, None] + np.arange(window)[None, :]], first)


def separate(ids: Int32[np.ndarray, "n w"]) -> Windows:
    """Rows that are windows as they are, each scored from its second token."""
    return Windows(ids, np.ones(len(ids), np.int64))
