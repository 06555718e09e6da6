# SPDX-License-Identifier: Apache-2.0
"""Strict JAX for the whole suite, and where the shared material lies when there is any."""

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory with real exports of the reference tool; tests that need it are skipped without
    it.
    """
    if not (SHARED / "golden").is_dir():
        pytest.skip("no ../shared here")
    return SHARED
