# SPDX-License-Identifier: Apache-2.0
"""jqx.auto_quantize of functions: scores against their definitions, groups, budgets, ModelOpt's
words, and what is refused.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jqx
from jqx.errors import InputError

WIDTH, LAYERS, VOCAB = 32, 3, 16


def drawn(*shape, seed=0, scale=0.2):
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape), jnp.float32)


def parameters(stacked=True):
    layers = {
        name: drawn(LAYERS, WIDTH, WIDTH, seed=i)
        for i, name in enumerate(("q_proj", "k_proj", "o_proj"))
    }
    whole = {"inp": drawn(WIDTH, WIDTH, seed=7), "out": drawn(WIDTH, VOCAB, seed=8, scale=1.0)}
    if stacked:
        return whole | {"layers": layers}
    return whole | {f"layer_{i}": {n: w[i] for n, w in layers.items()} for i in range(LAYERS)}


def layer(h, w):
    mixed = jax.nn.silu(h @ w["q_proj"]) * (h @ w["k_proj"])
    return h + mixed @ w["o_proj"]


def scanned(params, x):
    h, _ = jax.lax.scan(lambda h, w: (layer(h, w), None), x @ params["inp"], params["layers"])
    return h @ params["out"]


def unrolled(params, x):
    h = x @ params["inp"]
    for i in range(LAYERS):
        h = layer(h, params[f"layer_{i}"])
    return h @ params["out"]


def loss(logits, x):
    return jnp.mean(jnp.square(jax.nn.log_softmax(logits)))


BATCHES = [drawn(4, 8, WIDTH, seed=10 + i, scale=1.0) for i in range(3)]
FORMATS = ("nvfp4", "fp8")


@pytest.fixture(scope="module")
def whole():
    return jqx.auto_quantize(
        unrolled, parameters(False), BATCHES, loss, FORMATS, bits=6.0, count="quantizable"
    )


def quantized_alone(f, params, recipe, path):
    """The function and parameters in which one linear, and nothing else, is stored."""
    stats = jqx.calibrate(f, params, BATCHES, recipe)
    stored = jqx.quantize(params, recipe, stats)
    parts = path.split(".")

    def put(tree, other, parts):
        key, *rest = parts
        return tree | {key: put(tree[key], other[key], rest) if rest else other[key]}

    return put(params, stored, parts)


def test_gradient_scores_follow_the_definition(whole):
    """One linear at a time, with the gradient of what it gives in the plain function."""
    params = parameters(False)
    for path in ("inp", "layer_1.o_proj", "out"):
        for recipe in FORMATS:
            alone, wanted = quantized_alone(unrolled, params, recipe, path), 0.0
            for x in BATCHES:
                added = jqx.probes(unrolled, params, x, paths=[path])

                def run(added, x=x):
                    return loss(jqx.probe(unrolled)(params, added, x), x)

                g = jax.jit(jax.grad(run))(added)[path][0]
                keep = lambda use, x, p=path: x if use.path == p else None  # noqa: E731
                _, met = jqx.observe(unrolled, keep, merge=lambda a, b: a)(params, x)
                leaf = alone
                plain = params
                for part in path.split("."):
                    leaf, plain = leaf[part], plain[part]
                mine = jax.jit(jqx.quantized(lambda p, x: x @ p))(leaf, met[path])
                wanted += float(jnp.sum(jnp.square(g * (mine - met[path] @ plain))))
            assert whole.scores[path][recipe] == pytest.approx(wanted, rel=1e-3), (path, recipe)
    assert whole.loss == pytest.approx(
        np.mean([float(loss(unrolled(params, x), x)) for x in BATCHES]), rel=1e-5
    )


def test_divergences_follow_the_definition():
    params = parameters(False)
    found = jqx.auto_quantize(
        unrolled, params, BATCHES, formats=FORMATS, bits=9.0, method="kl_div", count="quantizable"
    )
    for path in ("inp", "layer_1.o_proj", "out"):
        for recipe in FORMATS:
            alone, wanted = quantized_alone(unrolled, params, recipe, path), 0.0
            for x in BATCHES:
                p = jax.nn.log_softmax(unrolled(params, x))
                q = jax.nn.log_softmax(jax.jit(jqx.quantized(unrolled))(alone, x))
                wanted += float(jnp.sum(jnp.exp(p) * (p - q)))
            assert found.scores[path][recipe] == pytest.approx(wanted, rel=0.02, abs=1e-5)
    assert found.loss is None


def test_fisher_expects_the_divergence():
    """A draw has the right mean, where changes are small: over 96 batches of 8 tokens, 4 draws."""
    params = parameters(False) | {"out": drawn(WIDTH, VOCAB, seed=8, scale=0.02)}
    batches = [drawn(1, 8, WIDTH, seed=100 + i, scale=1.0) for i in range(96)]
    kl, fisher = (
        jqx.auto_quantize(
            unrolled, params, batches, formats=("fp8",), bits=9.0, method=m, count="quantizable"
        ).scores
        for m in ("kl", "fisher")
    )
    ratios = [fisher[group]["fp8"] / kl[group]["fp8"] for group in kl]
    assert 0.85 < np.mean(ratios) < 1.15
    assert max(ratios) / min(ratios) < 1.6


@pytest.mark.parametrize("method", ["gradient", "kl"])
def test_a_scan_scores_as_the_sum_of_its_layers(method):
    """A stack has one format; gradients of its members add up, each with its own inputs."""
    more = {"formats": ("nvfp4",), "bits": 9.0, "method": method, "count": "quantizable"}
    stack = jqx.auto_quantize(scanned, parameters(), BATCHES, loss, **more)
    assert set(stack.scores) == {"inp", "layers.k_proj", "layers.o_proj", "out"}
    if method == "gradient":
        alone = jqx.auto_quantize(unrolled, parameters(False), BATCHES, loss, **more)
        for name in ("k_proj", "o_proj"):
            mine = stack.scores[f"layers.{name}"]["nvfp4"]
            its = sum(alone.scores[f"layer_{i}.{name}"]["nvfp4"] for i in range(LAYERS))
            assert mine == pytest.approx(its, rel=0.3)  # scales are of the whole stack
    out = jax.jit(jqx.quantized(scanned))(stack.params, BATCHES[0])
    assert bool(jnp.isfinite(out).all())


def test_what_reads_one_input_chooses_together(whole):
    for i in range(LAYERS):
        assert whole.choices[f"layer_{i}.q_proj"] == whole.choices[f"layer_{i}.k_proj"]
        assert f"layer_{i}.k_proj" in whole.scores  # the first of them in the order of the tree
        assert f"layer_{i}.q_proj" not in whole.scores


def test_scores_of_a_group_are_the_sum_of_its_members(whole):
    """Under other names the same linears choose by themselves."""
    params = {
        f"renamed_{key}" if isinstance(value, dict) else key: (
            {n.replace("_proj", ""): w for n, w in value.items()}
            if isinstance(value, dict)
            else value
        )
        for key, value in parameters(False).items()
    }

    def renamed(params, x):
        own = {
            key.removeprefix("renamed_"): {f"{n}_proj": w for n, w in value.items()}
            if isinstance(value, dict)
            else value
            for key, value in params.items()
        }
        return unrolled(own, x)

    alone = jqx.auto_quantize(
        renamed, params, BATCHES, loss, FORMATS, bits=6.0, count="quantizable"
    )
    for i in range(LAYERS):
        for recipe in FORMATS:
            members = [alone.scores[f"renamed_layer_{i}.{n}"][recipe] for n in ("k", "q")]
            assert whole.scores[f"layer_{i}.k_proj"][recipe] == pytest.approx(
                sum(members), rel=1e-4
            )


@given(bits=st.floats(4.6, 16.0))
@settings(max_examples=25, deadline=None)
def test_budgets_are_kept(whole, bits):
    found = whole.within(bits)
    numel = {path: math.prod(np.shape(w)) for path, w in leaves(parameters(False)).items()}
    stored = {"nvfp4": 4.5, "fp8": 8.0, "none": 16.0}
    spent = sum(numel[path] * stored[name] for path, name in found.choices.items())
    assert found.bits["quantizable"] == pytest.approx(spent / sum(numel.values()))
    assert found.bits["quantizable"] <= bits * (1 + 1e-9)
    score = sum(found.scores[g].get(found.choices[g], 0.0) for g in found.scores)
    assert found.score <= score + 1e-12  # scores are made monotone
    points = list(found.curve)
    assert points == sorted(points)


def leaves(tree, prefix=""):
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def test_the_rules_quantize_so(whole):
    params = parameters(False)
    again = jqx.quantize(
        params, whole.config, jqx.calibrate(unrolled, params, BATCHES, whole.config)
    )
    assert jax.tree.structure(again) == jax.tree.structure(whole.params)
    for mine, its in zip(jax.tree.leaves(again), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(its))


def test_the_words_of_modelopt(whole):
    found = jqx.auto_quantize(
        unrolled,
        parameters(False),
        BATCHES,
        loss,
        quantization_formats=[jqx.NVFP4_DEFAULT_CFG, jqx.FP8_DEFAULT_CFG],
        constraints={"effective_bits": 6.0},
        num_calib_steps=3,
        num_score_steps=3,
    )
    assert found.choices == whole.within(6.0).choices
    older = jqx.auto_quantize(
        unrolled,
        parameters(False),
        BATCHES,
        loss,
        auto_quantize_bits=9.0,
        disabled_layers=["out", "layer_0.k_proj"],
    )
    assert not {"out", "layer_0.k_proj", "layer_0.q_proj"} & set(older.choices)
    assert older.bits["modelopt"] <= 9.0


def test_experts_count_by_their_share():
    params = {"mlp": {"experts": {"w1": drawn(WIDTH, WIDTH)}}, "out": drawn(WIDTH, VOCAB, seed=1)}

    def f(params, x):
        return jax.nn.relu(x @ params["mlp"]["experts"]["w1"]) @ params["out"]

    cost = {"cost_model": "active_moe", "cost": {"active_moe_expert_ratio": 0.25}}
    found = jqx.auto_quantize(
        f, params, BATCHES, loss, ("fp8",), constraints={"effective_bits": 12.0, **cost}
    )
    experts, out = 0.25 * WIDTH * WIDTH, WIDTH * VOCAB
    bits = {"fp8": 8, "none": 16}
    spent = experts * bits[found.choices["mlp.experts.w1"]] + out * bits[found.choices["out"]]
    assert found.bits["modelopt"] == pytest.approx(spent / (experts + out))


def test_linen_modules_work_unmodified():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(48, name="up")(x))
            return nn.Dense(VOCAB, name="down")(x)

    net = Net()
    params = net.init(jax.random.key(0), BATCHES[0])
    found = jqx.auto_quantize(
        net.apply, params, BATCHES, lambda y, x: jnp.mean(y**2), bits=7.0, count="quantizable"
    )
    assert set(found.choices) == {"up.kernel", "down.kernel"}
    out = jax.jit(jqx.quantized(net.apply))(found.params, BATCHES[0])
    assert out.shape == (4, 8, VOCAB)


WRONG = {
    "no scalar": ({"loss_fn": lambda y, x: y}, r"loss_fn gives \(4, 8, 16\): give a scalar"),
    "no number": ({"loss_fn": lambda y, x: jnp.nan * jnp.sum(y)}, "the loss is nan"),
    "no loss": ({"loss_fn": None}, "gradients are of a loss: give loss_fn"),
    "too few bits": ({"bits": 4.0}, r"4 bits a weight cannot be reached .* the least is 4.50"),
    "no bits": ({"bits": 0.0}, r"bits is 0.0; give a number in \(0, 16\]"),
    "no formats": ({"formats": ()}, "no formats are given"),
    "formats twice": ({"formats": ("fp8", "fp8")}, "formats are given twice"),
    "another format": ({"formats": ("fp9",)}, "fp9"),
    "another method": ({"method": "gradients"}, "unknown method 'gradients'"),
    "another word": ({"auto_quantise_bits": 5}, "did you mean auto_quantize_bits"),
    "another constraint": ({"constraints": {"bits": 5}}, "unknown constraint 'bits'"),
    "no mapping": ({"constraints": 5.0}, "constraints is a float"),
    "another count": ({"count": "all"}, "unknown way to count bits 'all'"),
    "no batches": ({"batches": []}, "there are no batches"),
    "no such layer": ({"disabled_layers": "head"}, "glob of layers to leave out"),
    "all disabled": ({"disabled_layers": ["*"]}, "nothing can be chosen"),
    "no steps": ({"num_score_steps": 0}, "num_score_steps is 0"),
    "no share": (
        {"constraints": {"cost_model": "active_moe"}},
        "needs the share of experts that a token meets",
    ),
}


@pytest.mark.parametrize(("given", "told"), WRONG.values(), ids=WRONG)
def test_what_is_refused(given, told):
    more = {"batches": BATCHES, "loss_fn": loss} | given
    with pytest.raises(InputError, match=told):
        jqx.auto_quantize(unrolled, parameters(False), **more)
