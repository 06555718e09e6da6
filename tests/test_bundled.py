# SPDX-License-Identifier: Apache-2.0
"""The model and the texts that travel with the package."""

import json
import re
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from jqx.models import param_shapes
from jqx_interop import EvalSettings, Settings, evaluate, inspect_checkpoint
from jqx_interop.checkpoints import BUNDLED, bundled_model, open_checkpoint, resolve_model
from jqx_interop.families import spec_from_config
from jqx_interop.job import prepare
from jqx_interop.pipeline import load_inputs

DATA = Path(str(files("jqx_interop.data")))
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model():
    return open_checkpoint(BUNDLED)


def test_the_word_is_a_model_unless_a_directory_has_its_name(tmp_path, monkeypatch):
    assert resolve_model(BUNDLED) == bundled_model()
    (tmp_path / BUNDLED).mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model(BUNDLED) == Path(BUNDLED)


def test_it_is_a_small_llama_in_bfloat16(model):
    assert (bundled_model() / "model.safetensors").stat().st_size <= 8_000_000
    assert {info.dtype for info in model.tensors.values()} == {"BF16"}
    spec = spec_from_config(model.config)
    assert spec.family == "llama"
    shapes = param_shapes(spec)
    assert {name: info.shape for name, info in model.tensors.items()} == shapes
    assert 2e6 < sum(int(np.prod(shape)) for shape in shapes.values()) < 5e6


def test_every_width_takes_every_format(model):
    widths = {n for info in model.tensors.values() for n in info.shape}
    assert not [n for n in widths if n % 128]


def test_its_tokenizer_fits(model):
    tokenizer = tokenizers.Tokenizer.from_file(str(bundled_model() / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == model.config["vocab_size"]
    described = json.loads((bundled_model() / "tokenizer_config.json").read_text())
    assert tokenizer.token_to_id(described["eos_token"]) == model.config["eos_token_id"]
    strange = "naïve 馬\x00\n"
    assert tokenizer.decode(tokenizer.encode(strange).ids) == strange


def test_inspect_knows_it():
    assert inspect_checkpoint(BUNDLED).facts["model_type"] == "llama"


def test_calibration_does_not_exceed_its_context():
    job = prepare(BUNDLED, "fp8", Settings(calib_size=3))
    calibration = load_inputs(job).calibration
    assert calibration is not None
    assert [batch.shape for batch in calibration] == [(1, 256)] * 3


def test_nothing_is_evaluated_on_what_is_calibrated_on():
    seen, held_out = (
        (DATA / name).read_text("utf-8") for name in ("calibration.txt", "evaluation.txt")
    )
    parts = [part for part in held_out.split("\n\n") if len(part) > 60]
    assert len(parts) > 100
    assert not [part for part in parts if part in seen]
    for name in ("calibration", "evaluation"):
        assert "licen" in (DATA / f"{name}.LICENSE.md").read_text("utf-8").lower()


def test_its_perplexity_is_the_one_in_the_readme():
    found = evaluate(BUNDLED, settings=EvalSettings(compute="float32"))
    (stated,) = re.findall(
        r"it has a perplexity of (\d+\.\d) a token", (ROOT / "README.md").read_text("utf-8")
    )
    assert found.perplexity == pytest.approx(float(stated), rel=0.005)


def test_it_is_far_better_than_pairs_of_tokens():
    card = (bundled_model() / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| .* \| [\d,]+ \| ([\d.]+) \| ([\d.]+) \|$", card, re.MULTILINE)
    assert len(rows) == 2
    assert all(2.5 * float(network) < float(pairs) for network, pairs in rows)
