# SPDX-License-Identifier: Apache-2.0
"""What no algorithm can work with is one clear error: exit code 2 of the command, InputError of the
function. What looks bad and is not, works.
"""

import json
import shutil
from pathlib import Path

import exports
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from command import jqx as command
from command import refused, snapshot
from functions import MLP, K, N, X, draw, mlp
from functions import refused as raises
from outputs import read

import jqx
from jqx import QuantConfig, Rule
from jqx.config import Algorithm

ACTS = ("--activations", "acts.safetensors")
PATH = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return small_model.write(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(model: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of the model and its recorded inputs, the current directory."""
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


INT4 = ("--qformat", "int4_awq", "--set", "block=32")
LOCAL_HESSIAN = ("--qformat", "nvfp4_local_hessian")
COMMANDS = {
    "unknown algorithm": ((*INT4, "--algorithm", "awq_lit"), ("'awq_lit'", "mean awq_lite")),
    "unknown key": ((*INT4, "--set", "alfa_step=1"), ("'alfa_step'", "did you mean alpha_step")),
    "no number": ((*INT4, "--set", "alpha_step=low"), ("alpha_step=low", "a number")),
    "step": ((*INT4, "--set", "alpha_step=0"), "alpha_step is 0.0; give a number in (0, 1]"),
    "alpha": (
        ("--qformat", "int8_sq", "--set", "alpha=1.5"),
        "alpha is 1.5; give a number from 0 to 1",
    ),
    "negative alpha": (
        ("--qformat", "int8_sq", "--set", "alpha=-0.5"),
        "alpha is -0.5; give a number from 0 to 1",
    ),
    "ratio": (
        ("--qformat", "nvfp4_awq_clip", "--set", "min_clip_ratio=0"),
        "min_clip_ratio is 0.0; give a number in (0, 1]",
    ),
    "block": (
        ("--qformat", "int4_awq", "--set", "block=48"),
        (PATH, "int4_b48", "48 values", "(64, 64)", "--set block=16"),
    ),
    "four bits only": (
        ("--qformat", "int8", "--algorithm", "awq_lite"),
        "awq_lite is not for weights in int8",
    ),
    "eight bits only": (
        ("--qformat", "int4", "--set", "block=32", "--algorithm", "smoothquant"),
        "smoothquant is not for weights in int4_b32",
    ),
    "no name for it": (
        ("--qformat", "mxfp4", "--algorithm", "awq_lite"),
        (PATH, "modelopt has no name for mxfp4", "awq factors"),
    ),
    "inputs": (
        ("--qformat", "fp8", "--algorithm", "entropy"),
        "entropy is not for weights in fp8",
    ),
    "no scale of inputs": (
        ("--qformat", "int8_weight_only", "--algorithm", "percentile"),
        "percentile chooses scales of inputs, and the configuration stores none",
    ),
    "nothing to search": (
        ("--qformat", "nvfp4", "--algorithm", "mse"),
        "mse is not for weights in nvfp4",
    ),
    "nothing to clip": (
        ("--qformat", "mxfp4", "--algorithm", "awq_clip"),
        "awq_clip is not for weights in mxfp4",
    ),
}


@pytest.mark.parametrize(("words", "saying"), COMMANDS.values(), ids=COMMANDS)
def test_commands(place: Path, words: tuple, saying):
    refused("quantize", "model", "out", *words, *ACTS, saying=saying)
    assert not (place / "out").exists()


RECIPES = {
    "nothing left": (
        "extends: int4_awq\nrules:\n  - {path_glob: '*', weight: null}\n",
        ("recipe mine selects none of the 15 linears", PATH),
    ),
    "unknown key": (
        "extends: int4_awq\nalgorithm: {method: awq_lite, alpha_stp: 0.1}\n",
        ("mine.yaml", "parameter of awq_lite 'alpha_stp'", "did you mean alpha_step"),
    ),
    "type": (
        "extends: int4_awq\nalgorithm: {method: awq_lite, alpha_step: high}\n",
        ("mine.yaml", "alpha_step is 'high'; give a number"),
    ),
    "range": (
        "extends: int8\nalgorithm: {method: smoothquant, alpha: 2}\n",
        ("mine.yaml", "alpha is 2.0; give a number from 0 to 1"),
    ),
    "no method": (
        "extends: int4_awq\nalgorithm: {alpha_step: 0.1}\n",
        ("mine.yaml", "algorithm", "{method: NAME}"),
    ),
    "after the low-rank part": (
        "extends: nvfp4\nalgorithm: [svdquant, awq_lite]\n",
        ("mine.yaml", "awq_lite after svdquant would scale inputs again"),
    ),
    "second step": (
        "extends: int4_awq\nalgorithm: [awq_lite, awq_clp]\n",
        ("mine.yaml", "'awq_clp'", "awq_clip"),
    ),
}


@pytest.mark.parametrize(("text", "saying"), RECIPES.values(), ids=RECIPES)
def test_recipe_files(place: Path, text: str, saying: tuple[str, ...]):
    Path("mine.yaml").write_text(text)
    before = snapshot(place)
    refused("quantize", "model", "out", "--recipe", "mine.yaml", *ACTS, saying=saying)
    refused("calibrate", "model", "out", "--recipe", "mine.yaml", *ACTS, saying=saying)
    assert snapshot(place) == before


def record(change) -> None:
    """Change the recorded inputs of every linear."""
    found = exports.load_file("acts.safetensors")
    changed = {key: np.ascontiguousarray(change(key, x)) for key, x in found.items()}
    exports.save_file(changed, "acts.safetensors")


def test_inputs_without_tokens(place: Path):
    record(lambda key, x: x[:, :0])
    for words in (INT4, ("--qformat", "int8_sq")):
        saying = ("acts.safetensors", "(2, 0, ", "no inputs")
        refused("quantize", "model", "out", *words, *ACTS, saying=saying)


@pytest.mark.parametrize(
    ("words", "value"),
    [(INT4, np.nan), ((*INT4, "--algorithm", "gptq"), np.inf), (LOCAL_HESSIAN, np.nan)],
)
def test_inputs_that_are_not_finite(place: Path, words: tuple, value: float):
    record(lambda key, x: np.full_like(x, value) if key.startswith(DOWN) else x)
    refused("quantize", "model", "out", *words, *ACTS, saying=(DOWN, "not finite"))
    refused("calibrate", "model", "stats", *ACTS, saying=("inputs of", DOWN, "not finite"))
    assert not (place / "out").exists()
    assert not (place / "stats").exists()


def test_a_model_that_is_not_known_needs_recorded_inputs(place: Path):
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**config, "model_type": "strange"}))
    refused("quantize", "model", "out", *INT4, saying=("model", "'strange'"))
    assert command("quantize", "model", "out", *INT4, *ACTS).code == 0


def test_inputs_that_depend_on_each_other_entirely_are_damped(place: Path):
    """All tokens are the same one: their second moments have one direction."""
    record(lambda key, x: np.broadcast_to(x[:1, :1], x.shape))
    words = ("--qformat", "int4", "--set", "block=32", "--algorithm", "gptq")
    done = command("quantize", "model", "out", *words, *ACTS, "--report", "told", "--json")
    assert done.code == 0, done.err
    rows = json.loads(Path("told/report.json").read_text())["linears"]
    assert len(rows) == 14
    assert all(0.0099 < row["damping"] < 1 for row in rows), rows[0]


@pytest.mark.parametrize("words", [INT4, ("--qformat", "int8_sq")])
def test_inputs_of_zeros_leave_finite_numbers(place: Path, words: tuple):
    record(lambda key, x: 0 * x)
    assert command("quantize", "model", "out", *words, *ACTS).code == 0
    for name, array in read(place / "out").items():
        assert np.isfinite(array.astype(np.float32)).all(), name


# --- the function


def searched(method: str, weight: str = "int8", **params) -> QuantConfig:
    rule = Rule(path_glob="up.kernel", weight=weight)
    return QuantConfig(rules=(rule,), algorithm=Algorithm.of(method, **params))


PARAMETERS = {
    "alpha": (searched("smoothquant", alpha=1.5), r"alpha is 1.5; give a number from 0 to 1"),
    "step": (searched("awq_lite", "nvfp4", alpha_step=0.0), r"alpha_step is 0.0; give a number in"),
    "ratio": (searched("awq_clip", "nvfp4", min_clip_ratio=2.0), r"min_clip_ratio is 2.0"),
    "key": (searched("awq_lite", "nvfp4", alpha=0.1), r"parameter of awq_lite 'alpha'.*alpha_step"),
    "type": (
        searched("awq_lite", "nvfp4", alpha_step="low"),
        r"alpha_step is 'low'; give a number",
    ),
    "method": (searched("awq"), r"unknown algorithm 'awq'; did you mean awq_"),
    "bits": (searched("awq_lite"), r"awq_lite is not for weights in int8"),
    "block": (searched("awq_lite", "int4_b48"), r"up.kernel .*int4_b48"),
}


@pytest.mark.parametrize(("cfg", "message"), PARAMETERS.values(), ids=PARAMETERS)
def test_configurations(cfg, message):
    raises(lambda: jqx.calibrate(mlp, MLP, [X], cfg), message)
    raises(lambda: jqx.quantize(MLP, cfg, axes=0), message)


NEEDED = {
    "smoothquant": (searched("smoothquant"), "channel_amax"),
    "awq_lite": (searched("awq_lite", "nvfp4"), "channel_mean"),
    "awq_clip": (searched("awq_clip", "nvfp4"), "gram"),
    "gptq": (searched("gptq"), "gram"),
}


@pytest.mark.parametrize(("cfg", "kind"), NEEDED.values(), ids=NEEDED)
def test_statistics_that_are_missing(cfg, kind):
    plain = jqx.calibrate(mlp, MLP, [X], searched("max", cfg.rules[0].weight))
    for give in (lambda: jqx.quantize(MLP, cfg, plain), lambda: jqx.quantize(MLP, cfg, axes=0)):
        raises(give, rf"^up.kernel: .* needs the statistics .*{kind}.*jqx.calibrate")


def test_a_configuration_that_leaves_everything_out():
    off = (Rule(path_glob="*", weight="int8"), Rule(path_glob="*", weight=None))
    cfg = QuantConfig(rules=off, algorithm="smoothquant")
    raises(lambda: jqx.calibrate(mlp, MLP, [X], cfg), r"No parameter gets a format")


def test_batches_without_tokens():
    cfg = searched("gptq")
    raises(lambda: jqx.calibrate(mlp, MLP, [jnp.zeros((0, K))], cfg), r"batch 0, \(\(0, 32\),\)")


def test_batches_that_are_not_finite():
    cfg = searched("gptq")
    raises(lambda: jqx.calibrate(mlp, MLP, [X, X * jnp.nan], cfg), r"up.kernel.*NaN|NaN.*up.kernel")


def test_tokens_that_depend_on_each_other_entirely_work():
    x = jnp.broadcast_to(draw(1, K), (9, K))
    cfg = searched("gptq")
    stored = jqx.quantize(MLP, cfg, jqx.calibrate(mlp, MLP, [x], cfg))
    q = stored["up"]["kernel"]
    off = np.asarray(x @ (jqx.dequantize(stored)["up"]["kernel"] - MLP["up"]["kernel"]))
    assert q.shape in ((N, K), (K, N))
    assert np.abs(off).max() < 0.01 * np.abs(np.asarray(x @ MLP["up"]["kernel"])).max()
