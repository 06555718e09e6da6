# SPDX-License-Identifier: Apache-2.0
"""What holds for every case of the zoo: `CHECKS`, a sentence -> the function that checks it."""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from equinox import filter_grad as grad  # parameters may have leaves that are no floats
from equinox import filter_jit as jit
from zoo import Case, Probed, Recorded, Rounded, straight

import jqx
from jqx import QuantConfig, Rule
from jqx.tensors.paths import leaf_names
from jqx.transforms import Use, untracked

KINDS = ("amax", "channel_amax", "tokens")


def close(case: Case, got: Any, want: Any) -> None:
    """Sums in another order, relative to the largest number in the tree: what is summed up to a
    gradient that is zero (that of a key's bias) is as large as others.
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    atol = case.rtol * max(np.abs(x).max(initial=0) for x in jax.tree.leaves(want))
    for mine, hand in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        mine, hand = np.asarray(mine, np.float32), np.asarray(hand, np.float32)
        np.testing.assert_allclose(mine, hand, rtol=case.rtol, atol=atol)


def equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def other_batch(case: Case) -> tuple[Any, ...]:
    """Other arguments of the same shapes."""

    def other(x: Any) -> Any:
        return jnp.asarray(-1.5 * np.flip(x), x.dtype) if x.dtype.kind == "f" else x

    return jax.tree.map(other, case.args)


def by_path(params: Any) -> dict[str, Any]:
    return dict(zip(leaf_names(params), jax.tree.leaves(params), strict=True))


def inputs(case: Case) -> list[str]:
    """The parameters that are in products."""
    return [path for path in case.contracted if path not in case.looked_up]


def config(case: Case, fmt: str) -> QuantConfig:
    """int8 for every matrix, and `fmt` for what it is multiplied with."""
    return QuantConfig(
        rules=tuple(
            Rule(path_glob=path, weight="int8", input=None if path in case.looked_up else fmt)
            for path in case.contracted
        )
    )


@lru_cache(maxsize=1)
def calibrated(case: Case) -> jqx.Stats:
    batches = [case.args, other_batch(case)]
    return jqx.calibrate(case.f, case.params, batches, statistics=KINDS)


@lru_cache(maxsize=1)
def recorded(case: Case) -> tuple[Any, dict[str, dict[str, np.ndarray]]]:
    """The result by hand, and the same statistics."""

    def run(params: Any, args: tuple[Any, ...]) -> tuple[Any, dict[Any, Any]]:
        at = Recorded()
        return case.by_hand(params, args, at), at.inputs

    batches = [case.args, other_batch(case)]
    (out, first), (_, second) = jit(lambda params: [run(params, b) for b in batches])(case.params)
    assert {path for path, _ in first | second} <= set(inputs(case))
    return out, {path: statistics(case, path, [first, second]) for path in inputs(case)}


def statistics(case: Case, path: str, batches: list[Any]) -> dict[str, np.ndarray]:
    """amax, channel_amax and tokens by definition; zeros for what is never met."""
    shape, met = by_path(case.params)[path].shape, {}
    for inputs in batches:
        for (name, member), xs in inputs.items():
            if name == path:
                met.setdefault(member, []).extend(map(np.asarray, xs))
    lead = tuple(shape[a] for a in case.stack.get(path, ()))
    k = math.prod(shape[a] for a in case.contracted[path])
    k = next((xs[0].shape[1] for xs in met.values()), k)  # fewer in a convolution
    found = {
        "amax": np.zeros(lead, np.float32),
        "channel_amax": np.zeros((*lead, k), np.float32),
        "tokens": np.zeros(lead, np.int32),
    }
    for member, xs in met.items():
        x = np.concatenate(xs)
        found["amax"][member] = np.abs(x).max(initial=0)
        found["channel_amax"][member] = np.abs(x).max(0, initial=0)
        found["tokens"][member] = len(x)
    return found


def int8_weights(case: Case, params: Any) -> Any:
    """Every matrix through int8 codes by definition, with the gradient of the identity."""

    def rounded(path: str, w: np.ndarray) -> np.ndarray:
        stack, columns = case.stack.get(path, ()), case.contracted[path]
        rows = tuple(a for a in range(w.ndim) if a not in (*stack, *columns))
        order = (*stack, *rows, *columns)
        moved = np.transpose(w, order)
        n, k = (math.prod(w.shape[a] for a in axes) for axes in (rows, columns))
        decoded = [reference.decode(m, "int8") for m in moved.reshape(-1, n, k)]
        return np.transpose(np.reshape(decoded, moved.shape), np.argsort(order))

    leaves = [
        straight(partial(rounded, path), x) if path in case.contracted else x
        for path, x in by_path(params).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def rounded_by_hand(case: Case, fmt: str) -> Callable[[Any], Any]:
    """The function of parameters by hand, on int8 weights and inputs in `fmt`."""
    at = Rounded(fmt, {path: found["amax"] for path, found in recorded(case)[1].items()})
    return lambda params: case.by_hand(int8_weights(case, params), case.args, at)


def score(out: Any) -> Any:
    return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(out))


@lru_cache(maxsize=1)
def static_by_hand(case: Case) -> tuple[Any, Any]:
    """The result and the gradients of its score with FP8 inputs; no gradients if there are none."""
    hand = rounded_by_hand(case, "fp8")
    if not case.differentiable:
        return jit(hand)(case.params), None

    def scored(params: Any) -> tuple[Any, Any]:
        out = hand(params)
        return score(out), out

    return jit(grad(scored, has_aux=True))(case.params)[::-1]


# --- the checks


def amax(use: Use, x: Any) -> Any:
    x = x[0] if use.op == "ragged_dot" else x
    return None if use.op == "gather" else jnp.max(jnp.abs(x.astype(jnp.float32)))


def observing_changes_nothing(case: Case) -> None:
    observing = jqx.observe(case.f, amax)
    if case.eager:
        equal(observing(case.params, *case.args)[0], case.f(case.params, *case.args))
    got, _ = jit(observing)(case.params, *case.args)
    equal(got, jit(case.f)(case.params, *case.args))


def by_hand_is_the_same_function(case: Case) -> None:
    close(case, jit(case.f)(case.params, *case.args), recorded(case)[0])


def axes_are_as_stated(case: Case) -> None:
    found = {p: a for p, a in jqx.axes(case.f, case.params, *case.args).items() if a.is_matrix}
    assert untracked(case.f, case.params, *case.args) == []
    assert {path: axes.contracted for path, axes in found.items()} == case.contracted
    assert {path: axes.stack for path, axes in found.items() if axes.stack} == case.stack
    assert {path: axes.problem for path, axes in found.items() if axes.problem} == {}
    assert {p for p, axes in found.items() if axes.ops == ("gather",)} == set(case.looked_up)


def statistics_are_those_by_hand(case: Case) -> None:
    stats, want = calibrated(case), recorded(case)[1]
    assert set(stats.entries) - set(stats.meta["names"]) == set(want)
    for path, kinds in want.items():
        for kind, hand in kinds.items():
            np.testing.assert_allclose(
                stats.get(path, kind), hand, case.rtol, case.rtol, err_msg=f"{path} {kind}"
            )
            assert stats.get(path, kind).dtype == hand.dtype


def quantized(case: Case, fmt: str) -> Any:
    qparams = jqx.quantize(case.params, config(case, fmt), calibrated(case))
    return jit(jqx.quantized(case.f))(qparams, *case.args)


def static_inputs_are_rounded(case: Case) -> None:
    close(case, quantized(case, "fp8"), static_by_hand(case)[0])


def dynamic_inputs_are_rounded(case: Case) -> None:
    if case.dynamic is None:
        pytest.skip("its inputs need one scale")
    hand = rounded_by_hand(case, case.dynamic)
    close(case, quantized(case, case.dynamic), jit(hand)(case.params))


def gradients_go_straight_through(case: Case) -> None:
    faked = jqx.fake_quantized(case.f, config(case, "fp8"), calibrated(case))
    out, grads = static_by_hand(case)
    if grads is None:
        close(case, jit(faked)(case.params, *case.args), out)
    else:
        mine = jit(grad(lambda params: score(faked(params, *case.args))))(case.params)
        close(case, mine, grads)


def probes_get_gradients_of_results(case: Case) -> None:
    if not (case.probed and case.differentiable):
        pytest.skip("has no probes")
    added = jqx.probes(case.f, case.params, *case.args)
    assert set(added) == set(inputs(case))
    probed = jqx.probe(case.f)

    def square(out: Any) -> Any:
        return sum(jnp.sum(jnp.square(y)) for y in jax.tree.leaves(out))

    mine = jit(grad(lambda a: square(probed(case.params, a, *case.args))))(added)
    hand = lambda a: square(case.by_hand(case.params, case.args, Probed(a)))  # noqa: E731
    close(case, mine, jit(grad(hand))(added))


CHECKS = {
    f.__name__.replace("_", " "): f
    for f in (
        observing_changes_nothing,
        by_hand_is_the_same_function,
        axes_are_as_stated,
        statistics_are_those_by_hand,
        static_inputs_are_rounded,
        dynamic_inputs_are_rounded,
        gradients_go_straight_through,
        probes_get_gradients_of_results,
    )
}


def check_all(cases: dict[str, Callable[[], Case]]) -> None:
    """Every check of every case. Raises an ExceptionGroup of those that fail."""
    failed = []
    for name, make in cases.items():
        case = make()
        for told, check in CHECKS.items():
            try:
                check(case)
            except pytest.skip.Exception:
                continue
            except Exception as error:
                error.add_note(f"{name}: {told}")
                failed.append(error)
    if failed:
        raise ExceptionGroup("in the zoo", failed)
