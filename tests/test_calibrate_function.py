# SPDX-License-Identifier: Apache-2.0
"""calibrate on functions of any parameters: maxima over batches, computed by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import LAYOUTS, MODEL, K, N, apply, config, draw, model, params_of, same
from jax.ad_checkpoint import checkpoint_name

import jqx
from jqx import Rule
from jqx.calibration import run
from jqx.tensors.stats import from_flat, merge, to_flat

PARAMS = {"up": {"kernel": draw(K, N), "bias": draw(N)}, "down": {"kernel": draw(N, K)}}
XS = [draw(rows, K, seed=rows) for rows in (3, 5, 2)]


def mlp(p, x):
    h = checkpoint_name(jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"][None]), "h")
    return h @ p["down"]["kernel"]


def by_hand(xs):
    """What the two kernels meet, as amaxes."""
    p = jax.tree.map(np.asarray, PARAMS)
    up = max(np.abs(x).max() for x in xs)
    hs = [np.tanh(np.asarray(x) @ p["up"]["kernel"] + p["up"]["bias"]) for x in xs]
    return {"up.kernel": up, "down.kernel": max(np.abs(h).max() for h in hs)}


def amaxes(stats):
    assert all(set(kinds) == {"amax"} for kinds in stats.entries.values())
    return {path: np.asarray(kinds["amax"]) for path, kinds in stats.entries.items()}


def close(got, want):
    assert got.keys() == want.keys()
    for path, amax in got.items():
        assert amax.dtype == np.float32
        np.testing.assert_allclose(amax, want[path], rtol=1e-6)


def pair(p, x, scale):
    return mlp(p, scale * x)


WAYS = {  # a function of what a batch is, the batches
    "list of arrays": (mlp, list(XS)),
    "NumPy": (mlp, [np.asarray(x) for x in XS]),
    "tuples": (lambda p, x, y: mlp(p, x + y), [(x, jnp.zeros_like(x)) for x in XS]),
    "dicts": (lambda p, batch: mlp(p, batch["x"]), [{"x": x, "n": None} for x in XS]),
    "lists": (lambda p, batch: mlp(p, batch[0] + batch[1]), [[x, 0 * x] for x in XS]),
    "with flags": (lambda p, x, on: mlp(p, x) if on else x, [(x, True) for x in XS]),
    "with numbers": (pair, [(x, 1.0) for x in XS]),
}


@pytest.mark.parametrize(("f", "batches"), WAYS.values(), ids=WAYS)
def test_batches_are_any_iterable_of_arguments(f, batches):
    """Of different lengths, too. A generator is gone through once."""
    for given in (batches, (b for b in batches)) if f is mlp else (iter(batches),):
        close(amaxes(jqx.calibrate(f, PARAMS, given, "fp8")), by_hand(XS))


def test_flags_that_change_are_functions_of_their_own():
    def f(p, x, twice):
        return mlp(p, 2 * x if twice else x)

    stats = jqx.calibrate(f, PARAMS, [(XS[0], False), (XS[1], True), (XS[2], False)], "fp8")
    close(amaxes(stats), by_hand([XS[0], 2 * XS[1], XS[2]]))


def test_what_is_collected_follows_from_the_configuration():
    named = {"h": by_hand(XS)["down.kernel"]}
    close(amaxes(jqx.calibrate(mlp, PARAMS, XS)), by_hand(XS) | named)
    down = config(path_glob="down", weight="int8", input="int8")
    close(amaxes(jqx.calibrate(mlp, PARAMS, XS, down)), {"down.kernel": named["h"]})
    for nothing_stored in (
        "int8_weight_only",
        "fp8_pc_pt",
        config(weight="fp8", input="fp8_token"),
    ):
        stats = jqx.calibrate(mlp, PARAMS, XS, nothing_stored)
        assert stats.entries == {}
        assert stats.meta["names"] == ["h"]
        assert stats.meta["axes"]["up.kernel"]["contracted"] == [0]
        assert jqx.quantize(PARAMS, nothing_stored, stats)["up"]["kernel"].columns == (0,)


def test_parameters_that_are_not_followed_are_listed():
    def f(p, x):
        return mlp(p, x) @ (p["scaled"] * 2)

    params = PARAMS | {"scaled": draw(K, K), "unused": draw(K, K)}
    keep = Rule(path_glob="scaled", weight=None, input=None)
    stats = jqx.calibrate(f, params, XS, config(Rule(weight="fp8", input="fp8"), keep))
    assert stats.meta["untracked"] == ["scaled"]
    assert "is not followed" in stats.meta["axes"]["scaled"]["problem"]
    assert "unused" not in stats.meta["axes"]
    close(amaxes(stats), by_hand(XS))


@pytest.mark.parametrize("name", ["out, in", "h, k, d", "scanned along axis 1", "ragged"])
def test_other_statistics_of_every_member(name):
    layout = LAYOUTS[name]
    params, x = params_of(layout), draw(*layout.batch)
    kinds = ("amax", "channel_amax", "tokens")
    f = apply(layout)
    (found,) = jqx.calibrate(f, params, [x, -x], None, kinds).entries.values()
    met = layout.inputs(np.asarray(params["layer"]["w"]), np.asarray(x))
    k = int(np.prod([layout.shape[a] for a in layout.contracted]))
    rows = [np.abs(m).reshape(-1, k) for m in met]
    lead = tuple(layout.shape[a] for a in layout.stack)
    want = {
        "amax": [m.max(initial=0) for m in rows],
        "channel_amax": [m.max(0, initial=0) for m in rows],
        "tokens": [2 * len(m) for m in rows],
    }
    for kind, values in want.items():
        assert found[kind].dtype == (jnp.int32 if kind == "tokens" else jnp.float32)
        np.testing.assert_allclose(
            found[kind], np.reshape(values, (*lead, *np.shape(values[0]))), rtol=1e-5
        )


def test_two_byte_activations_are_reduced_as_they_are():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    xs = [x.astype(jnp.bfloat16) for x in XS]
    stats = jqx.calibrate(mlp, params, xs, "fp8")
    got = amaxes(stats)
    assert got["up.kernel"] == max(np.abs(np.asarray(x, np.float32)).max() for x in xs)
    run_alone = jax.jit(lambda p, x: jnp.tanh(x @ p["kernel"] + p["bias"][None]))
    hs = [np.asarray(run_alone(params["up"], x), np.float32) for x in xs]
    np.testing.assert_allclose(got["down.kernel"], max(np.abs(h).max() for h in hs), rtol=2**-8)
    assert got["down.kernel"] == got["down.kernel"].astype(jnp.bfloat16)
    assert jqx.quantize(params, "fp8", stats)["up"]["kernel"].dtype == jnp.bfloat16


# --- how it runs


def test_a_batch_of_the_same_shape_compiles_nothing():
    traced = []

    def f(p, x):
        traced.append(x.shape)
        return mlp(p, x)

    def times(batches):
        traced.clear()
        jqx.calibrate(f, PARAMS, batches, "fp8")
        return len(traced)

    x, y = draw(3, K), draw(4, K)
    assert times([x] * 2) == times([x] * 7)
    assert times([x, y] * 3) == times([x] * 2) + 1


def test_statistics_are_donated_and_parameters_are_not(monkeypatch):
    steps, own = [], run._step

    def spied(reduced):
        step = own(reduced)

        def spy(total, mine, arrays, index):
            text = step.lower(total, mine, arrays, index).as_text()
            out = step(total, mine, arrays, index)
            gone = [x.is_deleted() for x in jax.tree.leaves(total)]
            steps.append((gone, text.count("tf.aliasing_output"), mine, arrays))
            return out

        return spy

    monkeypatch.setattr(run, "_step", spied)
    jqx.calibrate(mlp, PARAMS, XS, "fp8")
    assert len(steps) == len(XS)
    for gone, aliases, mine, arrays in steps:
        assert all(gone)
        assert aliases == len(gone) == 4
        assert not any(x.is_deleted() for x in (*mine, *arrays))


# --- what comes of it


def test_statistics_of_two_runs_are_those_of_one():
    batches = [draw(2, K, seed=i) for i in range(5)]
    kinds = ("amax", "channel_amax", "tokens")
    parts = [jqx.calibrate(mlp, PARAMS, b, "fp8", kinds) for b in (batches[:2], batches[2:])]
    whole = jqx.calibrate(mlp, PARAMS, batches, "fp8", kinds)
    same(merge(*parts), whole)
    same(merge(*parts[::-1]), whole)


def test_statistics_survive_files():
    stats = jqx.calibrate(model, MODEL, [np.zeros((1, 2), np.int32)], "nvfp4")
    arrays, metadata = to_flat(stats)
    back = from_flat(arrays, json.loads(json.dumps(metadata)))
    same(back, stats)
    assert back.meta == stats.meta
    assert {"axes", "names", "untracked"} <= stats.meta.keys()
    same(jqx.quantize(MODEL, "nvfp4", back), jqx.quantize(MODEL, "nvfp4", stats))
