# SPDX-License-Identifier: Apache-2.0
"""Every kernel becomes a program for the devices it is written for, which are not here."""

import jax
import jax.numpy as jnp
import pytest
from lowering import TARGETS, cases, lowered

CASES = [(platform, name) for platform in TARGETS for name in cases(platform)]


@pytest.mark.parametrize(("platform", "name"), CASES)
def test_kernels_become_programs(platform, name):
    f, args = cases(platform)[name]
    assert TARGETS[platform].call in lowered(f, args, platform)


@pytest.mark.parametrize("platform", TARGETS)
def test_other_programs_call_no_kernel(platform):
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    assert TARGETS[platform].call not in lowered(lambda x: x + 1, (x,), platform)
