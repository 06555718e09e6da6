# SPDX-License-Identifier: Apache-2.0
"""Functions that call jax.shard_map themselves: what is collected on devices that have parts of
weights and of batches is what one device collects, and the same is computed.
"""

import pytest
from devices import run_on_devices

HEAD = """
import jax.numpy as jnp
import numpy as np
from functions import config, draw, scanned
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import jqx

MESH = Mesh(
    np.array(jax.devices()).reshape(2, 2), ("data", "model"), axis_types=(AxisType.KIND,) * 2
)
if "KIND" == "Explicit":
    jax.set_mesh(MESH)
CFG = config(weight="nvfp4", input="fp8")
together = lambda y: lax.psum(y, "model")
heads = lambda w, x: jnp.einsum("bhk,hkn->bn", x, w)
experts = lambda w, x: jnp.einsum("ebk,ekn->ebn", x, w)
every_expert = lambda w, x: jnp.einsum("bk,ekn->ebn", x, w)

def layers(w, x):  # each device has a half of the inputs of every layer
    def layer(h, v):
        mine = lax.dynamic_slice_in_dim(h, lax.axis_index("model") * 16, 16, 1)
        return jnp.tanh(together(mine @ v)), None
    return lax.scan(layer, x, w)[0]

each = ("data", "model")
CASES = {  # on one device, on each device, shapes and specs of weight and batch, spec of the result
    "rows": (
        lambda w, x: x @ w, lambda w, x: x @ w,
        (32, 16), (4, 32), P(None, "model"), P("data", None), P("data", "model"),
    ),
    "inputs": (
        lambda w, x: x @ w, lambda w, x: together(x @ w),
        (32, 16), (4, 32), P("model", None), P("data", "model"), P("data", None),
    ),
    "inputs on two axes": (
        heads, lambda w, x: together(heads(w, x)),
        (4, 8, 16), (4, 4, 8), P("model", None, None), P("data", "model", None), P("data", None),
    ),
    "inputs of layers": (
        scanned, layers, (3, 32, 32), (4, 32), P(None, "model", None), P("data", None), P("data"),
    ),
    "experts": (
        experts, experts,
        (4, 32, 16), (4, 6, 32), P("model", None, None), P("model", "data", None),
        P("model", "data", None),
    ),
    "an expert on each device": (
        experts, experts,
        (4, 32, 16), (4, 6, 32), P(each, None, None), P(each, None, None), P(each, None, None),
    ),
    "experts that see the same": (
        every_expert, every_expert,
        (4, 32, 16), (6, 32), P("model", None, None), P("data", None), P("model", "data", None),
    ),
    "nothing of the weight": (
        scanned, scanned, (3, 32, 32), (4, 32), P(None, None, None), P("data", None), P("data"),
    ),
}
if "KIND" == "Auto":  # stored codes have an axis less, so explicit types do not fit this one
    CASES["inputs on the second of two axes"] = (
        heads, lambda w, x: together(heads(w, x)),
        (4, 8, 16), (4, 4, 8), P(None, "model", None), P("data", None, "model"), P("data", None),
    )

def each_case(check_vma):
    some = ("rows", "inputs of layers", "experts")
    wanted = CASES if check_vma and "KIND" == "Auto" else some
    for name in wanted:
        one, mine, w, x, *places = CASES[name]
        w, x = draw(*w) / 4, draw(*x)
        at = [jax.device_put(a, NamedSharding(MESH, s)) for a, s in zip((w, x), places)]
        many = jax.shard_map(
            mine, mesh=MESH, in_specs=tuple(places[:2]), out_specs=places[2], check_vma=check_vma
        )
        yield name, (one, w, x), (many, *at)
"""

COLLECTED = """
kinds = ["amax", "channel_amax"] + ["tokens"] * CHECKED
for name, (f, w, x), (g, *sharded) in each_case(CHECKED):
    want = jqx.calibrate(f, w, [x], None, kinds)
    got = jqx.calibrate(g, sharded[0], [sharded[1]], None, kinds)
    assert got.meta == want.meta, name
    (found,), (wanted,) = got.entries.values(), want.entries.values()
    for kind in kinds:
        assert found[kind].shape == wanted[kind].shape, (name, kind, found[kind].shape)
        np.testing.assert_allclose(
            found[kind], wanted[kind], rtol=1e-5, err_msg=f"{name} {kind}"
        )
print("done")
"""

COMPUTED = """
for name, (f, w, x), (g, *sharded) in each_case(CHECKED):
    stats = jqx.calibrate(f, w, [x], CFG)
    want = jax.jit(jqx.quantized(f))(jqx.quantize(w, CFG, stats), x)
    q = jqx.quantize(sharded[0], CFG, stats)
    got = jax.jit(jqx.quantized(g))(q, sharded[1])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=name)
    fake = jax.jit(jqx.fake_quantized(g, CFG, stats))
    np.testing.assert_array_equal(fake(*sharded), got, err_msg=name)
print("done")
"""


def done(script: str, kind: str, checked: bool) -> None:
    text = (HEAD + script).replace("KIND", kind).replace("CHECKED", str(checked))
    assert run_on_devices(4, text).strip().endswith("done")


@pytest.mark.parametrize(("kind", "checked"), [("Auto", True), ("Auto", False), ("Explicit", True)])
def test_statistics_are_those_of_one_device(kind, checked):
    done(COLLECTED, kind, checked)


@pytest.mark.parametrize(("kind", "checked"), [("Auto", True), ("Auto", False), ("Explicit", True)])
def test_stored_weights_compute_what_one_device_does(kind, checked):
    done(COMPUTED, kind, checked)
