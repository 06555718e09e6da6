# SPDX-License-Identifier: Apache-2.0
"""Stored weights with a low-rank part: y = Q(x p) W^T + ((x p) A^T) B^T in every layout of a
weight, against the same by hand.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import run_on_devices
from functions import LAYOUTS, apply, draw
from jax import lax
from storing import DECODE, ENCODE, SCALE, K, N, rounded, run, store

import jqx
from jqx import InputError, QTensor
from jqx.models import FLOAT32, thin
from jqx.tensors.layout import from_matrices

RANK = 3


def factors(*shape, seed=7):
    """A pair for matrices of `shape` [*lead, n, k]."""
    *lead, n, k = shape
    return draw(*lead, n, RANK, seed=seed) / 2, draw(*lead, RANK, k, seed=seed + 1) / 2


def with_part(q: QTensor) -> tuple[QTensor, jax.Array]:
    """`q` with a low-rank part, and that part as an array like its own."""
    k = np.prod([q.shape[a] for a in q.columns])
    n = q.size // k // np.prod(q.codes.shape[:-2], dtype=int)
    pair = factors(*q.codes.shape[:-2], int(n), int(k))
    return q.replace(low_rank=pair), from_matrices(jnp.matmul(*pair), q.layout)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


# --- every layout


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "convolution"])
def test_it_counts_to_the_weight_in_every_layout(name):
    layout = LAYOUTS[name]
    q = ENCODE(draw(*layout.shape), "int8", axis=layout.contracted, stack=layout.stack)
    stored, part = with_part(q)
    x = draw(*layout.batch, seed=1)
    got = run(apply(layout), {"layer": {"w": stored}}, x)
    want = jax.jit(apply(layout))({"layer": {"w": DECODE(q) + part}}, x)
    close(got, want)
    assert not np.allclose(got, jax.jit(apply(layout))({"layer": {"w": DECODE(q)}}, x), atol=0.1)


SEEN = {
    "some rows": (lambda w, x: x @ w[3:9].T, (N, K), (1,)),
    "every other row": (lambda w, x: x @ w[1::2].T, (N, K), (1,)),
    "a row": (lambda w, x: x @ w[5], (N, K), (1,)),
    "rows as heads": (lambda w, x: jnp.einsum("bk,hdk->bhd", x, w.reshape(4, 4, K)), (N, K), (1,)),
    "some heads": (
        lambda w, x: jnp.einsum("bk,hdk->bhd", x, w.reshape(4, 4, K)[1:3]),
        (N, K),
        (1,),
    ),
    "heads turned and merged": (
        lambda w, x: x @ w.transpose(1, 2, 0).reshape(-1, K).T,
        (K, 4, 6),
        (0,),
    ),
    "weight first": (lambda w, x: w @ x.T, (N, K), (1,)),
    "the same for each of a batch": (
        lambda w, x: jnp.einsum("bk,bkn->bn", x, jnp.broadcast_to(w.T[None], (2, K, N))),
        (N, K),
        (1,),
    ),
    "inputs as heads": (
        lambda w, x: jnp.einsum("bhd,nhd->bhn", x.reshape(2, 1, K), w.reshape(N, 1, K)),
        (N, K),
        (1,),
    ),
    "inputs in two axes": (
        lambda w, x: jnp.tensordot(x.reshape(2, 4, 8), w.reshape(N, 4, 8), [[1, 2], [1, 2]]),
        (N, K),
        (1,),
    ),
    "inputs in two axes, turned": (
        lambda w, x: jnp.einsum(
            "bhd,dhn->nb", x.reshape(2, 4, 8), w.reshape(4, 8, N).swapaxes(0, 1)
        ),
        (4, 8, N),
        (0, 1),
    ),
}


@pytest.mark.parametrize(("f", "shape", "contracted"), SEEN.values(), ids=SEEN)
def test_parts_of_a_weight_have_their_own(f, shape, contracted):
    q = ENCODE(draw(*shape), "int8", axis=contracted, stack=())
    stored, part = with_part(q)
    x = draw(2, K, seed=1)
    close(run(f, stored, x), jax.jit(f)(DECODE(q) + part, x))


def test_two_side_by_side():
    """As a model that fuses queries and keys does it."""
    a, b = (with_part(ENCODE(draw(n, K, seed=n), "int8")) for n in (6, 10))
    x = draw(2, K, seed=1)

    def f(p, x):
        return x @ jnp.concatenate([p["a"], p["b"]]).T

    dense = {"a": DECODE(a[0]) + a[1], "b": DECODE(b[0]) + b[1]}
    close(run(f, {"a": a[0], "b": b[0]}, x), jax.jit(f)(dense, x))


# --- what it sees of the inputs


def by_hand(q, x, factor=1, scale=SCALE):
    outer, inner = map(np.asarray, q.low_rank)
    x = x * np.asarray(factor)
    return rounded(x, "fp8", scale) @ np.asarray(DECODE(q)).T + (x @ inner.T) @ outer.T


@pytest.mark.parametrize("factor", [None, np.exp(np.asarray(draw(K, seed=4)))], ids=["1", "p"])
def test_inputs_are_scaled_for_it_and_not_rounded(factor):
    x = np.asarray(draw(3, K, seed=1)) * 9
    scaled = {} if factor is None else {"pre_quant_scale": factor}
    q = store(draw(N, K), low_rank=factors(N, K), **scaled)
    want = by_hand(q, x, 1 if factor is None else factor)
    close(run(lambda w, x: x @ w.T, q, x), want)
    saturated = rounded(x * (1 if factor is None else factor))
    outer, inner = map(np.asarray, q.low_rank)
    rounds_both = saturated @ (np.asarray(DECODE(q)) + outer @ inner).T
    assert not np.allclose(want, rounds_both, rtol=1e-2, atol=1e-2)


def members(layers=3, **fields):
    """A stack whose members scale their inputs, each in its own way."""
    scales = np.float32([0.01, 0.02, 0.04])[:layers]
    given = {"pre_quant_scale": jnp.exp(draw(layers, K, seed=5)), **fields}
    w = draw(layers, K, K) / 6
    return store(w, "nvfp4", input_scale=scales, low_rank=factors(layers, K, K), **given)


def one_of(q, i):
    return jax.tree.map(lambda a: a[i], q)


def in_turn(q, x):
    for i in range(3):
        m = one_of(q, i)
        x = np.tanh(by_hand(m, x, m.pre_quant_scale, np.asarray(m.input_scale)))
    return x


LOOPS = {
    "scan": lambda w, x: lax.scan(lambda h, v: (jnp.tanh(h @ v.T), None), x, w)[0],
    "indexed": lambda w, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w[i].T), x),
    "unrolled": lambda w, x: jnp.tanh(jnp.tanh(jnp.tanh(x @ w[0].T) @ w[1].T) @ w[2].T),
    "remat in scan": lambda w, x: lax.scan(
        jax.checkpoint(lambda h, v: (jnp.tanh(h @ v.T), None)), x, w
    )[0],
}


@pytest.mark.parametrize("f", LOOPS.values(), ids=LOOPS)
def test_layers_of_a_stack(f):
    q, x = members(), np.asarray(draw(2, K, seed=1)) * 3
    np.testing.assert_allclose(run(f, q, x), in_turn(q, x), atol=2e-3)


def test_experts():
    q, x = members(), np.asarray(draw(3, 5, K, seed=1)) * 3
    got = run(lambda w, x: jnp.einsum("ebk,enk->ebn", x, w), q, x)
    for i in range(3):
        m = one_of(q, i)
        close(got[i], by_hand(m, x[i], m.pre_quant_scale, np.asarray(m.input_scale)))


def test_vmap_over_members_and_over_batches():
    q, x = members(), draw(3, 5, K, seed=1) * 3
    f = jqx.quantized(lambda w, x: x @ w.T)
    got = jax.jit(jax.vmap(f))(q, x)
    for i in range(3):
        close(got[i], f(one_of(q, i), x[i]))
    batched = jax.jit(jax.vmap(f, in_axes=(None, 0)))(one_of(q, 0), x)
    close(batched[2], f(one_of(q, 0), x[2]))


def test_gradients_of_activations_go_through_both_products():
    factor = jnp.exp(draw(K, seed=4))
    q, x = store(draw(N, K), low_rank=factors(N, K), pre_quant_scale=factor), draw(3, K, seed=1)
    weight = (DECODE(q) + jnp.matmul(*q.low_rank)) * factor[None]
    f = jqx.quantized(lambda w, x: (x @ w.T).sum())
    want = jnp.broadcast_to(weight.sum(0)[None], x.shape)
    close(jax.jit(jax.grad(f, argnums=1))(q, x), want)
    stack = members()
    through = jax.grad(lambda x: jqx.quantized(LOOPS["scan"])(stack, x).sum())
    assert np.isfinite(jax.jit(through)(x)).all()
    to_factors = jax.grad(lambda pair: f(q.replace(low_rank=pair), x))
    for got in jax.jit(to_factors)(q.low_rank):
        assert np.abs(got).min() > 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_stay(dtype):
    pair = tuple(part.astype(dtype) for part in factors(N, K))
    q = store(draw(N, K).astype(dtype), low_rank=pair, pre_quant_scale=jnp.ones(K, dtype))
    x = (draw(3, K, seed=1) * 9).astype(dtype)

    def f(w, x):
        return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    outer, inner = (np.asarray(part, np.float32) for part in pair)
    narrow = np.asarray(jnp.asarray(np.asarray(x, np.float32) @ inner.T, dtype), np.float32)
    w = np.asarray(DECODE(q), np.float32)
    want = rounded(x).astype(np.float32) @ w.T + narrow @ outer.T
    close(run(f, q, x), want, 1e-2 if dtype == jnp.bfloat16 else 1e-3)
    assert run(lambda w, x: x @ w.T, q, x).dtype == dtype


def test_results_between_are_settled():
    q, x = store(draw(N, K), low_rank=factors(N, K)), np.asarray(draw(3, K, seed=1))
    f = jax.jit(jqx.quantized(lambda w, x: x @ w.T, settle=lambda x: 0.5 * x))
    outer, inner = map(np.asarray, q.low_rank)
    want = 0.5 * rounded(x) @ np.asarray(DECODE(q)).T + 0.25 * (x @ inner.T) @ outer.T
    close(f(q, x), want, 1e-4)


@pytest.mark.parametrize("rows", [1, 4])
def test_products_of_a_few_rows_have_it_too(rows):
    q, x = store(draw(N, 64), low_rank=factors(N, 64)), np.asarray(draw(rows, 64, seed=1)) * 9
    f = jqx.quantized(lambda p, x: x @ p["w"].T, product=thin.few_rows({"w": q}, FLOAT32))
    close(jax.jit(f)({"w": q}, x), by_hand(q, x))


# --- what is refused

ALONE = ENCODE(draw(N, K), "int8").replace(low_rank=factors(N, K))
KERNEL, _ = with_part(ENCODE(draw(3, K, 8), "int8", axis=(0, 1)))
REFUSED = {
    "looked up": (ALONE, lambda w, x: x + w[jnp.argmax(x, axis=1)], "rows of it are looked up"),
    "rows at fixed places": (ALONE, lambda w, x: x + w[jnp.asarray([1, 0])], "drop .* low_rank"),
    "scaled": (ALONE, lambda w, x: x @ (2 * w).T, "or has a low-rank part, .* and low_rank"),
    "the other axis": (ALONE, lambda w, x: x[:, :N] @ w, "inputs along axis 1"),
    "some of the inputs": (ALONE, lambda w, x: x[:, :8] @ w[:, :8].T, "8 inputs at once"),
    "some of the inputs, in fp8": (
        store(draw(N, K), low_rank=factors(N, K)),
        lambda w, x: x[:, :8] @ w[:, :8].T,
        "8 inputs at once",
    ),
    "a stack at once": (members(), lambda w, x: jnp.einsum("bk,enk->ebn", x, w), "scan over it"),
    "a convolution": (
        KERNEL,
        lambda w, x: lax.conv_general_dilated(
            x[None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        "not a low-rank part",
    ),
}


@pytest.mark.parametrize(("q", "f", "message"), REFUSED.values(), ids=REFUSED)
def test_where_it_could_not_be_added_is_refused(q, f, message):
    with pytest.raises(InputError, match=rf"^layer\.w .*{message}"):
        jax.eval_shape(
            jqx.quantized(lambda p, x: f(p["layer"]["w"], x)),
            {"layer": {"w": q}},
            draw(2, K),
        )


# --- devices

SHARDED = """
import jax.numpy as jnp
import numpy as np
from functions import draw
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import jqx

DEVICES = np.array(jax.devices()).reshape(2, 2)
MESH = Mesh(DEVICES, ("data", "model"), axis_types=(AxisType.KIND,) * 2)
on = lambda spec: NamedSharding(MESH, spec)
w, x = draw(64, 32), draw(4, 32, seed=1)
q = jqx.QTensor.quantize(w, "nvfp4").replace(
    input_format="fp8",
    input_scale=jnp.float32(0.01),
    pre_quant_scale=jnp.exp(draw(32, seed=2)),
    low_rank=(draw(64, 3, seed=3), draw(3, 32, seed=4)),
)
linear = jqx.quantized(lambda w, x: x @ w.T)
want = jax.jit(linear)(q, x)
places = q.shardings(on(P("model", None)))
put, batch = jax.device_put(q, places), jax.device_put(x, on(P("data", None)))
if "KIND" == "Explicit":
    jax.set_mesh(MESH)
got = jax.jit(linear)(put, batch)
assert len(got.sharding.device_set) == 4
np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)

# summed over what lies on several devices
out = P("data", None) if "KIND" == "Explicit" else None
f = lambda w, x: jnp.einsum("bk,nk->bn", x, w, out_sharding=out)
columns = q.shardings(on(P(None, "model")))
put, batch = jax.device_put(q, columns), jax.device_put(x, on(P("data", "model")))
np.testing.assert_allclose(jax.jit(jqx.quantized(f))(put, batch), want, rtol=1e-5, atol=1e-4)
put, batch = jax.device_put(q, places), jax.device_put(x, on(P("data", None)))
if "KIND" == "Auto":
    piece = jax.tree.map(lambda a: a.spec, places)
    parts = P("data", "model")
    mapped = jax.shard_map(linear, mesh=MESH, in_specs=(piece, P("data")), out_specs=parts)
    np.testing.assert_allclose(jax.jit(mapped)(put, batch), want, rtol=1e-5, atol=1e-4)
    inside = lambda w, x: jax.shard_map(
        lambda w, x: x @ w.T, mesh=MESH, in_specs=(P("model"), P("data")), out_specs=parts
    )(w, x)
    got = jax.jit(jqx.quantized(inside))(q, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
print("done")
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_weights_on_several_devices(kind):
    assert run_on_devices(4, SHARDED.replace("KIND", kind)).strip().endswith("done")
