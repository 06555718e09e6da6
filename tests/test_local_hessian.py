# SPDX-License-Identifier: Apache-2.0
"""local_hessian beside a slow search in NumPy, and the errors at the outputs beside ModelOpt's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_golden_formats import group_amax, read
from test_mse import BFLOAT16, SIMULATED, spread, tried, weight

from jqx.algorithms import Linear, calibrated, stored
from jqx.algorithms.local_hessian import LocalHessian, local_hessian
from jqx.config import Algorithm
from jqx.errors import InputError
from jqx.formats import decode, find_format
from jqx.formats.encode import Encoded

RUN = jax.jit(local_hessian, static_argnums=(1, 3))


def inputs(tokens=40, k=256):
    """Channels of very different size that go together."""
    r = np.random.RandomState(8)
    mix = np.eye(k) + 0.3 * r.standard_normal((k, k)) / 4
    return (r.standard_normal((tokens, k)) @ mix * np.exp(r.standard_normal(k))).astype(np.float32)


def within(x, size):
    """Second moments of blocks of `size` channels."""
    parts = x.reshape(len(x), -1, size)
    return np.einsum("mki,mkj->kij", parts, parts)


def slow_losses(w, fmt, grids, whole, moments):
    """d^T H d summed over what shares a scale, [grids, rows, scales of a row], one at a time."""
    x, out, size = w.astype(np.float32), [], moments.shape[1]
    for grid in grids:
        d = x - SIMULATED[fmt.name](x, spread(grid, fmt, x.shape), whole)
        d = d.astype(np.float64)
        cols = fmt.block[1] or x.shape[1]
        loss = np.zeros((len(d), x.shape[1] // cols))
        for i in range(len(d)):
            for j, h in enumerate(moments):
                part = d[i, j * size : (j + 1) * size]
                loss[i, j * size // cols] += part @ h @ part
        out.append(loss)
    return np.array(out)


CASES = [
    ("nvfp4", {}),
    ("int8", {"fp8_scale_sweep": False}),
    ("int4", {"fp8_scale_sweep": False, "block_size": 64, "step_size": 0.3}),
]


@pytest.mark.parametrize(("name", "given"), CASES)
def test_the_search_follows_the_definition(name, given):
    w, fmt, params = weight(), find_format(name), LocalHessian(**given)
    moments = within(inputs(), params.block_size)
    found = RUN(Linear(jnp.asarray(w)), fmt, {"block_gram": jnp.asarray(moments)}, params)
    whole = np.float32(np.abs(w.astype(np.float32)).max())
    grids = tried(w, fmt, params, whole)
    losses = slow_losses(w, fmt, grids, whole, moments)
    wanted = np.take_along_axis(np.array(grids), losses.argmin(0)[None], 0)[0]
    sure = np.sort(losses, 0)[1] > losses.min(0) * (1 + 1e-4)
    assert sure.mean() > 0.6  # a row and a block are zeros
    np.testing.assert_array_equal(np.asarray(found.amax)[sure], wanted[sure])


def test_all_second_moments_and_the_tokens_themselves_tell_the_same():
    w, fmt, x = jnp.asarray(weight()), find_format("nvfp4"), inputs()
    kinds = {"gram": x.T @ x, "root": x, "block_gram": within(x, 16)}
    found = [
        RUN(Linear(w), fmt, {k: jnp.asarray(a)}, LocalHessian()).amax for k, a in kinds.items()
    ]
    for other in found[1:]:
        assert (np.asarray(found[0]) == np.asarray(other)).mean() > 0.98


@pytest.mark.parametrize(("name", "given"), CASES)
def test_jit_eager_and_stacks_agree(name, given):
    fmt, params = find_format(name), LocalHessian(**given)
    moments = jnp.asarray(within(inputs(), params.block_size))
    stack = jnp.stack([jnp.asarray(weight()), jnp.asarray(weight()[::-1] * 2)])
    both = jnp.stack([moments, moments[::-1]])

    def amax(w, h):
        return local_hessian(Linear(w), fmt, {"block_gram": h}, params).amax

    together = jax.vmap(amax)(stack, both)
    for w, h, one in zip(stack, both, together, strict=True):
        assert (np.asarray(jax.jit(amax)(w, h)) == np.asarray(one)).mean() > 0.98
        np.testing.assert_array_equal(amax(w, h), jax.jit(amax)(w, h))


def test_what_does_not_fit_is_refused():
    linear = Linear(jnp.asarray(weight()))
    with pytest.raises(InputError, match=r"shares a scale over 16 .* block_size is 32"):
        local_hessian(linear, find_format("nvfp4"), {}, LocalHessian(block_size=32))
    with pytest.raises(InputError, match=r"local_hessian needs second moments"):
        local_hessian(linear, find_format("nvfp4"), {}, LocalHessian())
    with pytest.raises(InputError, match="block_size is 0"):
        LocalHessian(block_size=0)
    with pytest.raises(InputError, match="step_size"):
        LocalHessian(step_size=-1.0)


def output_error(x, w, stored_weight):
    """Share of the outputs that is lost."""
    y = x @ w.T
    return np.square(x @ stored_weight.T - y).sum() / np.square(y).sum()


def test_outputs_are_as_good_as_those_of_modelopt(shared):
    folder, fmt = shared / "golden", find_format("nvfp4")
    base, acts = read(folder / "base" / "model.safetensors"), read(folder / "acts.safetensors")
    recorded = json.loads((folder / "nvfp4_local_hessian" / "golden.json").read_text())
    steps = (Algorithm.of("local_hessian"),)
    for path, theirs in recorded["output_error"].items():
        batches = [a for key, a in acts.items() if key.startswith(f"{path}|")]
        x = np.concatenate([a.reshape(-1, a.shape[-1]) for a in batches]).astype(np.float32)
        w = base[f"{path}.weight"]
        linear = Linear(jnp.asarray(w), tensor_amax=jnp.float32(group_amax(base, path)))
        stats = {"block_gram": jnp.asarray(within(x, 16))}
        mine = stored(calibrated(linear, stats, fmt=fmt, steps=steps), fmt)
        back = decode(Encoded(mine.codes, mine.scale, mine.tensor_scale), fmt)
        assert output_error(x, w.astype(np.float32), np.asarray(back)) <= theirs * 1.01, path


def test_the_weight_keeps_its_dtype():
    w = jnp.asarray(weight(dtype=BFLOAT16))
    found = RUN(
        Linear(w), find_format("nvfp4"), {"gram": jnp.eye(256, dtype=jnp.float32)}, LocalHessian()
    )
    assert found.weight.dtype == jnp.bfloat16
    assert found.amax.dtype == jnp.float32
