# SPDX-License-Identifier: Apache-2.0
"""Functions of parameters and batches that lie on several devices: the same numbers as on one, and
everything stays where it is.
"""

import pytest
from devices import run_on_devices

HEAD = """
import re
import jax.numpy as jnp
import numpy as np
from functions import config, draw, same
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import jqx
from jqx.calibration import run as calibration

D, F = 64, 128
EXPLICIT = "KIND" == "Explicit"
MESH = Mesh(
    np.array(jax.devices()).reshape(2, 2), ("data", "model"), axis_types=(AxisType.KIND,) * 2
)
params = {"up": draw(D, F), "down": draw(F, D), "gain": draw(D), "layers": draw(3, D, D) / 8}
specs = {"up": P(None, "model"), "down": P("model", None), "gain": P(), "layers": P()}
if not EXPLICIT:
    params |= {"q": draw(D, 4, 16) / 8, "o": draw(4, 16, D) / 8, "experts": draw(4, D, D)}
    specs |= {"q": P(None, "model", None), "o": P("model", None, None)}
    specs |= {"layers": P(None, None, "model"), "experts": P("model", None, None)}
xs = [draw(8, D, seed=i) for i in range(3)]
on = lambda spec: NamedSharding(MESH, spec)
sharded = {name: jax.device_put(x, on(specs[name])) for name, x in params.items()}
batches = [jax.device_put(x, on(P("data", None))) for x in xs]

def model(out=None):
    def f(p, x):
        h = jnp.tanh(x @ p["up"])
        x = jnp.einsum("bf,fd->bd", h, p["down"], out_sharding=out) * p["gain"][None]
        if "q" in p:
            heads = jnp.tanh(jnp.einsum("bd,dhk->bhk", x, p["q"]))
            x = x + jnp.einsum("bhk,hkd->bd", heads, p["o"])
        x = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0]
        return jnp.einsum("bd,edf->ebf", x, p["experts"]) if "q" in p else x
    return f

one, f = model(), model(P("data", None) if EXPLICIT else None)
if EXPLICIT:
    jax.set_mesh(MESH)
"""

CALIBRATED = """
steps, own = [], calibration._step

def spied(reduced):
    step = own(reduced)
    def spy(*args):
        steps.append((args[1], step.lower(*args).compile().as_text()))
        return step(*args)
    return spy

want = jqx.calibrate(one, params, xs, "fp8")
calibration._step = spied
got = jqx.calibrate(f, sharded, batches, "fp8")
assert got.meta == want.meta
assert got.entries.keys() == want.entries.keys() == set(params) - {"gain"}
for path, kinds in want.entries.items():
    np.testing.assert_allclose(got.entries[path]["amax"], kinds["amax"], rtol=1e-5)
assert len(steps) == len(xs)
sizes = {",".join(map(str, x.shape)) for n, x in params.items() if specs[n] != P()}
for arrays, text in steps:
    for x, mine in zip(arrays, jax.tree.leaves(sharded), strict=True):
        assert x is mine
    gathered = re.findall(r"= f32\\[([0-9,]+)\\]\\S* all-gather", text)
    assert not sizes & set(gathered), gathered  # no parameter is put together
for name, x in sharded.items():
    assert x.sharding == on(specs[name]) and not x.is_deleted()
print("done")
"""

STORED = """
stats = jqx.calibrate(one, params, xs, "fp8")
for recipe in ("fp8",) if EXPLICIT else ("nvfp4", "int8"):
    want, got = (jqx.quantize(p, recipe, stats) for p in (params, sharded))
    same(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, want))
    assert got["gain"] is sharded["gain"]
    for name in set(got) - {"gain"}:
        q = got[name]
        for leaf, place in zip(
            jax.tree.leaves(q), jax.tree.leaves(q.shardings(on(specs[name]))), strict=True
        ):
            assert leaf.sharding == place, (name, leaf.sharding, place)
        parts = 1 if specs[name] == P() else 2
        assert parts * q.codes.addressable_shards[0].data.nbytes == q.codes.nbytes
    y = jax.jit(jqx.quantized(f))(got, batches[0])
    np.testing.assert_allclose(y, jax.jit(jqx.quantized(one))(want, xs[0]), rtol=1e-3, atol=1e-4)
    assert len(y.sharding.device_set) == 4
got = jqx.quantize(sharded, "nvfp4", stats)
assert got["up"].codes.sharding.spec == got["up"].scale.sharding.spec == P("model", None)
assert got["down"].codes.sharding.spec == got["down"].scale.sharding.spec == P(None, "model")
print("done")
"""

# one linear with an input scale, and one expert of a stack on each device
PIECES = """
from functools import partial
w, x = draw(D, F), xs[0]
cfg = config(weight="nvfp4", input="fp8")
stats = jqx.calibrate(lambda p, x: x @ p["up"], {"up": w}, [x], cfg)
q = jqx.quantize({"up": sharded["up"]}, cfg, stats)
piece = jax.tree.map(lambda a: a.sharding.spec, q)
linear = jqx.quantized(lambda p, x: x @ p["up"])
mapped = jax.shard_map(linear, mesh=MESH, in_specs=(piece, P("data")), out_specs=P("data", "model"))
want = linear(jqx.quantize({"up": w}, cfg, stats), x)
np.testing.assert_allclose(jax.jit(mapped)(q, batches[0]), want, rtol=1e-5, atol=1e-4)

experts = lambda p, x: jnp.einsum("bd,edf->ebf", x, p["w"])
batched = lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["w"])
w, x = draw(4, D, D), draw(4, 6, D)
stats = jqx.calibrate(batched, {"w": w}, [x], cfg)
want = jqx.quantized(batched)(jqx.quantize({"w": w}, cfg, stats), x)
q = jqx.quantize({"w": jax.device_put(w, on(P(("data", "model"))))}, cfg, stats)
assert q["w"].input_scale.sharding.spec == P(("data", "model"))
piece = jax.tree.map(lambda a: a.sharding.spec, q)
every = P(("data", "model"))
mapped = jax.shard_map(jqx.quantized(batched), mesh=MESH, in_specs=(piece, every), out_specs=every)
np.testing.assert_allclose(jax.jit(mapped)(q, x), want, rtol=1e-5, atol=1e-4)
print("done")
"""

# halved weights have the same codes, and half the scales; then to disk and back
DONATED_AND_SAVED = """
import tempfile
import orbax.checkpoint as ocp
q = jqx.quantize(sharded, config(weight="int8"), axes=jqx.axes(one, params, xs[0]))
places = jax.tree.map(lambda a: a.sharding, q)

def halved(p):
    dense = jax.tree.map(lambda x: x / 2, jqx.dequantize(p))
    return jqx.quantize(dense, config(weight="int8"), axes=jqx.axes(one, params, xs[0]))

want = jax.tree.map(np.asarray, halved(q))
stored = [leaf for name, x in q.items() if name != "gain" for leaf in jax.tree.leaves(x)]
out = jax.jit(halved, out_shardings=places, donate_argnums=0)(q)
assert all(leaf.is_deleted() for leaf in stored)
same(jax.tree.map(np.asarray, out), want)
assert jax.tree.map(lambda a: a.sharding, out) == places

like = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), out
)
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder + "/saved", out)
    checkpointer.wait_until_finished()
    back = checkpointer.restore(folder + "/saved", like)
same(back, out)
assert jax.tree.map(lambda a: a.sharding, back) == places
print("done")
"""


# every expert has the scale of its inputs, which lies where the expert does
EXPERTS = """
f = lambda w, x: jnp.einsum("ebk,ekn->ebn", x, w)
cfg, w, x = config(weight="nvfp4", input="fp8"), draw(4, 32, 16), draw(4, 6, 32)
stats = jqx.calibrate(f, w, [x], cfg)
want = jax.jit(jqx.quantized(f))(jqx.quantize(w, cfg, stats), x)
w, x = (jax.device_put(a, on(s)) for a, s in ((w, P("model")), (x, P("model", "data"))))
q = jqx.quantize(w, cfg, stats)
assert q.input_scale.sharding.spec == P("model")
for got in (jax.jit(jqx.quantized(f))(q, x), jax.jit(jqx.fake_quantized(f, cfg, stats))(w, x)):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
print("done")
"""


def done(script: str, kind: str = "Auto") -> None:
    assert run_on_devices(4, HEAD.replace("KIND", kind) + script).strip().endswith("done")


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_calibration_leaves_parameters_where_they_are(kind):
    done(CALIBRATED, kind)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_codes_and_scales_lie_as_their_weight_and_compute_the_same(kind):
    done(STORED, kind)


def test_pieces_of_stored_weights_in_shard_map():
    done(PIECES)


def test_donated_and_saved_where_it_lies():
    done(DONATED_AND_SAVED)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_experts_have_the_scales_of_their_inputs_beside_them(kind):
    done(EXPERTS, kind)
