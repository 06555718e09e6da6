# SPDX-License-Identifier: Apache-2.0
"""QTensors on several devices: what lies where, and that it computes the same there."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from devices import run_on_devices
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jqx.errors import InputError
from jqx.tensors import QTensor

MESH = AbstractMesh((2, 4), ("a", "b"))


def abstract(shape, name, axis=-1, stack=()):
    w = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return jax.eval_shape(lambda w: QTensor.quantize(w, name, axis=axis, stack=stack), w)


def specs(q, *names):
    return jax.tree.map(lambda s: s.spec, q.shardings(NamedSharding(MESH, P(*names))))


PLACED = {  # the array, its spec, that of codes and of scales
    "whole blocks": (abstract((8, 128), "nvfp4"), ("a", "b"), ("a", "b"), ("a", "b")),
    "6 blocks in 4 shards": (abstract((8, 96), "nvfp4"), ("a", "b"), ("a", "b"), ("a", None)),
    "3 bytes of rows": (abstract((6, 512), "int4"), ("a", "b"), (None, "b"), (None, "b")),
    "6 bytes of columns": (abstract((8, 16), "nvfp4_b4"), ("a", "b"), ("a", "b"), ("a", "b")),
    "2 bytes of columns": (abstract((8, 4), "nvfp4_b4"), ("a", "b"), ("a", None), ("a", None)),
    "scale per row": (abstract((8, 128), "int8"), ("a", "b"), ("a", "b"), ("a", None)),
    "one scale": (abstract((8, 128), "fp8"), ("a", "b"), ("a", "b"), ()),
    "tiles": (abstract((512, 512), "fp8_block"), ("a", "b"), ("a", "b"), ("a", "b")),
    "3 tiles of rows": (abstract((384, 512), "fp8_block"), ("a", "b"), ("a", "b"), (None, "b")),
    "ragged tiles": (abstract((400, 512), "fp8_block"), ("b", "a"), ("b", "a"), (None, "a")),
    "uneven": (abstract((7, 128), "mxfp8"), ("a", "b"), (None, "b"), (None, "b")),
    "a short spec": (abstract((8, 128), "mxfp8"), ("a",), ("a", None), ("a", None)),
    "both axes of the mesh": (
        abstract((16, 128), "mxfp8"),
        (("a", "b"), None),
        (("a", "b"), None),
        (("a", "b"), None),
    ),
    "attention": (abstract((128, 4, 6), "nvfp4", 0), ("a", "b", None), ("b", "a"), ("b", "a")),
    "3 heads": (abstract((128, 3, 4), "nvfp4", 0), (None, "a"), (None, None), (None, None)),
    "a minor row axis": (
        abstract((128, 4, 8), "nvfp4", 0),
        (None, "a", "b"),
        ("a", None),
        ("a", None),
    ),
    "output": (abstract((8, 32, 6), "nvfp4", (0, 1)), ("b", None, "a"), ("a", "b"), ("a", "b")),
    "a minor contraction axis": (
        abstract((8, 32, 6), "nvfp4", (0, 1)),
        (None, "b", "a"),
        ("a", None),
        ("a", None),
    ),
    "layers": (
        abstract((128, 4, 2, 6), "nvfp4", 0, (1,)),
        (None, "b", "a", None),
        ("b", "a", None),
        ("b", "a", None),
    ),
    "experts, one scale each": (
        abstract((4, 128, 6), "fp8", 1, (0,)),
        ("b", None, "a"),
        ("b", "a", None),
        ("b",),
    ),
}


@pytest.mark.parametrize(("q", "spec", "codes", "scale"), PLACED.values(), ids=PLACED)
def test_codes_and_scales_lie_where_their_array_does(q, spec, codes, scale):
    got = specs(q, *spec)
    assert (got.codes, got.scale) == (P(*codes), P(*scale))
    assert jax.tree.structure(got) == jax.tree.structure(q)


def test_the_other_parts_lie_with_them():
    q = abstract((128, 4, 2, 6), "nvfp4", 0, (1,))
    shape = lambda *s: jax.ShapeDtypeStruct((4, *s), jnp.float32)  # noqa: E731
    q = q.replace(
        input_scale=shape(),
        pre_quant_scale=shape(128),
        low_rank=(shape(12, 3), shape(3, 128)),
    )
    got = specs(q, "b", None, "a")
    assert got.tensor_scale == got.input_scale == P(None)
    assert got.pre_quant_scale == P(None, "b")
    assert got.low_rank == (P(None, "a", None), P(None, None, "b"))
    got = specs(q, None, "b")
    assert got.tensor_scale == got.input_scale == P("b")


def test_a_sharding_of_another_array_is_refused():
    with pytest.raises(InputError, match=r"tells of 3 axes and the array \(8, 128\) has 2"):
        specs(abstract((8, 128), "int8"), "a", None, "b")


HEAD = """
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jqx.errors import InputError
from jqx.tensors import QTensor

MESH = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"), axis_types=(AxisType.KIND,) * 2)
CASES = {  # shape, contraction axes, stack axes, spec
    "matrix": ((8, 256), -1, (), P("a", "b")),
    "attention": ((256, 4, 2), 0, (), P("b", "a")),
    "output": ((8, 32, 12), (0, 1), (), P("b", None, "a")),
    "layers": ((256, 2, 4, 2), 0, (1,), P("b", None, "a")),
    "experts": ((2, 256, 8), 1, (0,), P("a", None, "b")),
}
NAMES = ("nvfp4", "int4", "fp8")
bits = lambda a: np.atleast_1d(np.asarray(a)).view(np.uint8)

def same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))

def each():
    for shape, axis, stack, spec in CASES.values():
        w = jnp.asarray(np.random.RandomState(0).standard_normal(shape), jnp.bfloat16)
        for name in NAMES:
            q = jax.jit(lambda w: QTensor.quantize(w, name, axis=axis, stack=stack))(w)
            yield w, q, NamedSharding(MESH, spec)
"""


SET = "jax.set_mesh(MESH)\n"  # JAX 0.12 asks for it where axes are explicit


def run(script, kind="Auto"):
    head = HEAD.replace("KIND", kind) + (SET if kind == "Explicit" else "")
    assert run_on_devices(4, head + script).strip().endswith("done")


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_placed_and_computed_by_jit(kind):
    script = """
for w, q, sharding in each():
    places = q.shardings(sharding)
    s = jax.device_put(q, places)
    for leaf, place in zip(jax.tree.leaves(s), jax.tree.leaves(places), strict=True):
        assert leaf.sharding == place
    assert 4 * s.codes.addressable_shards[0].data.nbytes == q.codes.nbytes, q.shape
    same(s, q)
    decode = jax.jit(QTensor.decode, in_shardings=(places,))
    np.testing.assert_array_equal(decode(s), q.decode())
    assert decode(s).sharding.is_equivalent_to(sharding, w.ndim), (q.shape, decode(s).sharding)
    store = lambda w: QTensor.quantize(w, q.format, axis=q.columns, stack=q.stack)
    again = jax.jit(store, out_shardings=places)(jax.device_put(w, sharding))
    assert again.codes.sharding == places.codes
    same(again, q)
print("done")
"""
    run(script, kind)


def test_pieces_in_shard_map():
    run("""
for w, q, sharding in each():
    places = q.shardings(sharding)
    specs = (jax.tree.map(lambda s: s.spec, places),)
    piece = lambda q: q.decode()
    f = jax.shard_map(piece, mesh=MESH, in_specs=specs, out_specs=sharding.spec)
    np.testing.assert_array_equal(jax.jit(f)(jax.device_put(q, places)), q.decode())

q = QTensor.quantize(jnp.ones((4, 48)), "nvfp4")  # 3 blocks in 2 shards
places = q.shardings(NamedSharding(MESH, P(None, "b")))
specs = jax.tree.map(lambda s: s.spec, places)
try:
    jax.jit(jax.shard_map(piece, mesh=MESH, in_specs=(specs,), out_specs=P(None, "b")))(q)
except InputError as error:
    assert "there are (4, 3)" in str(error), error
    print("done")
""")


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_multiplied_as_one_device_does(kind):
    script = """
import jqx
x = jnp.asarray(np.random.RandomState(1).standard_normal((4, 256)), jnp.float32)
f = lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"].astype(jnp.float32))
w = jnp.asarray(np.random.RandomState(0).standard_normal((256, 4, 2)), jnp.bfloat16)
for name in NAMES:
    q = QTensor.quantize(w, name, axis=0, stack=())
    q = q.replace(input_format="fp8", input_scale=jnp.float32(0.01))
    s = jax.device_put(q, q.shardings(NamedSharding(MESH, P(None, "a"))))
    run = jax.jit(jqx.quantized(f))
    y = run({"w": s}, jax.device_put(x, NamedSharding(MESH, P("b"))))
    np.testing.assert_allclose(y, run({"w": q}, x), rtol=1e-5, atol=1e-4)
    assert y.sharding.is_equivalent_to(NamedSharding(MESH, P("b", "a")), 3), y.sharding
print("done")
"""
    run(script, kind)


def test_donated():
    run("""
step = jax.jit(
    lambda q: q.replace(scale=(q.scale.astype(jnp.float32) * 2).astype(q.scale.dtype)),
    donate_argnums=0,
)
for w, q, sharding in each():
    s = jax.device_put(q, q.shardings(sharding))
    wanted, where = step(jax.tree.map(jnp.copy, q)), jax.tree.map(lambda a: a.sharding, s)
    there = {shard.data.unsafe_buffer_pointer() for shard in s.codes.addressable_shards}
    out = step(s)
    assert all(a.is_deleted() for a in jax.tree.leaves(s))
    assert {shard.data.unsafe_buffer_pointer() for shard in out.codes.addressable_shards} == there
    assert out.codes.sharding == where.codes
    same(out, wanted)
print("done")
""")


def test_saved_and_restored_where_it_was():
    run("""
import tempfile
import orbax.checkpoint as ocp
trees = {}
for i, (w, q, sharding) in enumerate(each()):
    q = q.replace(input_scale=jnp.ones(q.codes.shape[:-2]), input_format="fp8")
    trees[f"layer{i}"] = jax.device_put(q, q.shardings(sharding))
like = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), trees
)
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder + "/saved", trees)
    checkpointer.wait_until_finished()
    back = checkpointer.restore(folder + "/saved", like)
same(back, trees)
for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(trees), strict=True):
    assert a.sharding == b.sharding
print("done")
""")


def test_formats_may_have_blocks_of_their_own():
    q = abstract((12, 128), "nvfp4")
    q = q.replace(format=replace(q.format, block=(2, 16)))
    q = q.replace(scale=jax.ShapeDtypeStruct((6, 8), q.scale.dtype))
    assert specs(q, "b", "a").scale == P(None, "a")
    assert specs(q, "a", "b").scale == P("a", "b")
