# SPDX-License-Identifier: Apache-2.0
"""The demonstration: its table, picture and checkpoint; and nothing left where it fails."""

import json
import math
import re
import stat

import command
import pytest

from jqx.errors import InputError
from jqx_interop import demo, load
from jqx_interop.demo import plot, run
from jqx_interop.demo.plot import Point, label_heights

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Two recipes on a little text."""
    out = tmp_path_factory.mktemp("demo") / "below" / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "HEADLINE", ("nvfp4", "int8"))
        patch.setattr(run, "EVALUATION", run.EvalSettings(max_tokens=1500))
        patch.setattr(run, "SPEECH", run.Sampling(max_new_tokens=8, temperature=0.0))
        patch.setattr(run, "CALIBRATION", {"calib_size": 2, "calib_seq": 64})
        return out, demo.run_demo(out)


def test_every_recipe_has_a_row_with_figures(done):
    _, result = done
    assert [row.recipe for row in result.rows] == ["nvfp4", "int8"]
    nvfp4, int8 = result.rows
    assert nvfp4.bits == pytest.approx(4.5, abs=0.01)
    assert 8 < int8.bits < 8.5
    assert nvfp4.size < int8.size < result.size
    assert 0 < int8.kl < nvfp4.kl < 1
    assert 0 < nvfp4.kl_se < nvfp4.kl
    assert 0.5 < nvfp4.top1 < int8.top1 < 1
    assert all(abs(math.log(row.perplexity / result.perplexity)) < 0.2 for row in result.rows)


def test_it_leaves_a_checkpoint_a_picture_and_the_figures(done):
    out, result = done
    assert {path.name for path in out.iterdir()} == {"nvfp4", "results.json", "bits_against_kl.png"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert json.loads((out / "results.json").read_text()) == json.loads(
        json.dumps(result.to_json())
    )
    assert (out / "bits_against_kl.png").read_bytes().startswith(PNG)
    assert (
        load(result.checkpoint).params["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"].bits < 5
    )
    ordinary = out.parent / "ordinary"
    ordinary.mkdir()
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_it_speaks_in_words(done):
    _, result = done
    assert set(result.texts) == {"none", "nvfp4"}
    assert all(re.search(r"[a-z]{2,} [a-z]+", text) for text in result.texts.values())


def test_what_is_there_is_not_touched(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="exists; name a new directory"):
        demo.run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    command.refused("demo", tmp_path, saying=str(tmp_path))


def test_a_run_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise InputError("the disk is full")

    monkeypatch.setattr(run, "ptq", fails)
    monkeypatch.setattr(run, "EVALUATION", run.EvalSettings(max_tokens=300))
    with pytest.raises(InputError):
        demo.run_demo(tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_labels_of_neighbours_are_apart():
    points = [Point(str(i), 4 + i / 10, 0.02, 0.001) for i in range(4)] + [
        Point("far", 16, 0.02, 0)
    ]
    heights = label_heights(points)
    near = sorted(math.log(height) for height in heights[:4])
    assert all(b - a >= plot.SPREAD - 1e-9 for a, b in zip(near, near[1:], strict=False))
    assert heights[4] == pytest.approx(0.02)


def test_a_point_without_an_error_is_drawn(tmp_path):
    plot.plot([Point("one", 4.5, 0.1, 0.0)], "title", tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(PNG)
