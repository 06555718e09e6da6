# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint that are one array in memory: names, order, there and back, and what does
not fit together.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import spec_of

from jqx import InputError, QTensor
from jqx.models import leaf_shapes, param_shapes
from jqx.tensors.stacks import member_name, members, stacked, unstacked

SHAPES = {
    "norm": (3,),
    "e.{}.up": (2, 4, 3),
    "e.{}.down": (2, 3, 4),
    "f.{}.up": (3, 2),
    "end": (1,),
}


def drawn(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_members_come_expert_by_expert_in_the_place_of_their_stacks():
    assert list(members(SHAPES).items()) == [
        ("norm", (3,)),
        ("e.0.up", (4, 3)),
        ("e.0.down", (3, 4)),
        ("e.1.up", (4, 3)),
        ("e.1.down", (3, 4)),
        ("f.0.up", (2,)),
        ("f.1.up", (2,)),
        ("f.2.up", (2,)),
        ("end", (1,)),
    ]
    assert member_name("a.{}.b.{}", 7) == "a.7.b.{}"


def test_there_and_back():
    named = {name: drawn(shape, i) for i, (name, shape) in enumerate(members(SHAPES).items())}
    found = stacked(named, SHAPES)
    assert {name: a.shape for name, a in found.items()} == SHAPES
    again = unstacked(found)
    assert again.keys() == named.keys()
    for name, array in named.items():
        np.testing.assert_array_equal(again[name], array)


def test_stored_members_are_a_stored_stack():
    whole = drawn((2, 32, 64))
    one = {f"e.{i}.up": QTensor.quantize(whole[i], "nvfp4") for i in range(2)}
    found = stacked(one, {"e.{}.up": (2, 32, 64)})["e.{}.up"]
    assert found.shape == (2, 32, 64)
    assert found.stack == (0,)
    for i, q in enumerate(unstacked({"e.{}.up": found}).values()):
        np.testing.assert_array_equal(q.decode(), one[f"e.{i}.up"].decode())


def test_what_does_not_belong_together_is_named():
    shapes = {"e.{}.up": (2, 4, 3)}
    with pytest.raises(InputError, match=r"^e\.1\.up is missing, and others"):
        stacked({"e.0.up": drawn((4, 3))}, shapes)
    unlike = {"e.0.up": drawn((4, 3)), "e.1.up": drawn((4, 2))}
    with pytest.raises(InputError, match=r"^e\.1\.up is not like e\.0\.up"):
        stacked(unlike, shapes)
    mixed = {"e.0.up": drawn((32, 64)), "e.1.up": QTensor.quantize(drawn((32, 64)), "fp8")}
    with pytest.raises(InputError, match=r"^e\.1\.up is not like"):
        stacked(mixed, shapes)
    assert stacked({"norm": 1}, shapes) == {"norm": 1}


@pytest.mark.parametrize("case", ["deepseek_v3", "gpt_oss", "llama_biases"])
def test_leaves_and_tensors_of_a_model_are_the_same_numbers(case):
    leaves, tensors = leaf_shapes(spec_of(case)), param_shapes(spec_of(case))
    assert members(leaves) == tensors
    assert sum(np.prod(s) for s in leaves.values()) == sum(np.prod(s) for s in tensors.values())
    assert any("{}" in name for name in leaves) == (case == "deepseek_v3")
