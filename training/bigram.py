# SPDX-License-Identifier: Apache-2.0
"""What counting pairs of tokens achieves: the baseline a network has to beat."""

import numpy as np

DISCOUNT = 0.75


def bigram_loss(train: np.ndarray, valid: np.ndarray, vocabulary: int) -> float:
    """Nats a token of an interpolated Kneser-Ney bigram model, over all of `valid` but its first
    token.

        p(b | a) = max(n(a, b) - d, 0) / n(a) + d kinds(a) / n(a) p(b)
        p(b)     ~ in how many kinds of pairs b is the second, plus one

    Kneser and Ney, Improved backing-off for m-gram language modeling, ICASSP 1995.
    """
    pairs, counts = np.unique(
        train[:-1].astype(np.int64) * vocabulary + train[1:], return_counts=True
    )
    first, second = pairs // vocabulary, pairs % vocabulary
    total = np.bincount(first, counts, vocabulary)
    kinds = np.bincount(first, minlength=vocabulary)
    lower = np.bincount(second, minlength=vocabulary) + 1.0
    lower /= lower.sum()
    a, b = valid[:-1].astype(np.int64), valid[1:]
    at = np.minimum(np.searchsorted(pairs, a * vocabulary + b), len(pairs) - 1)
    seen = np.where(pairs[at] == a * vocabulary + b, counts[at], 0)
    known = np.maximum(total[a], 1)
    higher = np.maximum(seen - DISCOUNT, 0) / known
    rest = np.where(total[a] > 0, DISCOUNT * kinds[a] / known, 1.0)
    return float(-np.log(higher + rest * lower[b]).mean())
