# SPDX-License-Identifier: Apache-2.0
"""The layers of DeepSeek V3 that predict further tokens: decoded, and left alone by all engines."""

import json
from pathlib import Path

import exports
import family_checkpoints
import foreign
import ml_dtypes
import numpy as np
import pytest
from command import jqx, snapshot
from damage import arrays
from foreign import FP8_BLOCKS
from stored_sources import floats
from tiny_families import ONE_EACH

from jqx_interop.checkpoints import DTYPES
from jqx_interop.engines.matching import matcher
from jqx_interop.engines.schemes import CT, MODELOPT

LAYER = "model.layers.3"
ENGINES = {MODELOPT: ("vllm", "sglang", "trtllm", None), CT: ("vllm", "sglang", None)}
KEPT = ("embed", "norm", "head", "mlp.gate.")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """DeepSeek V3 in FP8 with a layer after its last, as DeepSeek stores it."""
    here = tmp_path_factory.mktemp("deepseek")
    plain = family_checkpoints.write(here / "plain", ONE_EACH["deepseek_v3"])
    tensors = arrays(plain)
    last = {n: a for n, a in tensors.items() if n.startswith("model.layers.2.")}
    tensors |= {n.replace("layers.2.", "layers.3."): a for n, a in last.items()}
    tensors |= {
        f"{LAYER}.eh_proj.weight": np.full((64, 128), 0.5, ml_dtypes.bfloat16),
        f"{LAYER}.enorm.weight": np.ones(64, ml_dtypes.bfloat16),
        f"{LAYER}.hnorm.weight": np.ones(64, ml_dtypes.bfloat16),
        f"{LAYER}.embed_tokens.weight": tensors["model.embed_tokens.weight"],
        f"{LAYER}.shared_head.norm.weight": np.ones(64, ml_dtypes.bfloat16),
        f"{LAYER}.shared_head.head.weight": tensors["model.embed_tokens.weight"],
    }
    config = json.loads((plain / "config.json").read_text())
    said = {"num_nextn_predict_layers": 1, "quantization_config": FP8_BLOCKS}
    stored = foreign.stored_as_fp8(tensors, (*KEPT, "eh_proj"))
    return foreign.put(here / "model", config | said, stored)


def listed(out: Path, layout: str) -> list[str]:
    """The modules that a checkpoint says are not quantized."""
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    if layout == MODELOPT:
        file = json.loads((out / "hf_quant_config.json").read_text())
        assert file["quantization"]["exclude_modules"] == said["ignore"]
    return said["ignore"]


def check(source: Path, out: Path, layout: str) -> None:
    """What lies in the layer, and what the lists say of it."""
    wanted, found = floats(source), exports.read_tensors(out)
    mine = {name for name in wanted if name.startswith(f"{LAYER}.")}
    assert {name for name in found if name.startswith(f"{LAYER}.")} == mine
    for name in mine:
        dtype, shape, raw = found[name]
        kept = np.frombuffer(raw, DTYPES[dtype]).reshape(shape)
        assert kept.dtype == wanted[name].dtype
        np.testing.assert_array_equal(kept, wanted[name])
    patterns = listed(out, layout)
    if layout == MODELOPT:
        assert [p for p in patterns if "layers.3" in p] == [f"{LAYER}*"]
    modules = [n.removesuffix(".weight") for n in mine if wanted[n].ndim == 2]
    experts = [path for path in modules if ".experts." in path]
    assert len(experts) == 24
    for engine in ENGINES[layout]:
        left = matcher(layout, engine, patterns)
        assert all(left(path, [path]) for path in modules), engine
        assert left(f"{LAYER}.mlp.experts", experts), engine
        assert not left("model.layers.2.mlp.experts", ["model.layers.2.mlp.experts.0.up_proj"])


def test_they_are_decoded_and_listed(source: Path, tmp_path: Path):
    given = ("--calib", source.parent / "ids.npy")
    done = jqx("quantize", source, tmp_path / "out", "--qformat", "nvfp4_deepseek", *given)
    assert done.code == 0, done.err
    assert "vLLM 0.32: loads" in done.out
    check(source, tmp_path / "out", MODELOPT)
    turned = jqx("export", tmp_path / "out", tmp_path / "turned", "--target", CT)
    assert turned.code == 0, turned.err
    check(source, tmp_path / "turned", CT)
    back = jqx("export", tmp_path / "turned", tmp_path / "back", "--target", MODELOPT)
    assert back.code == 0, back.err
    assert snapshot(tmp_path / "back") == snapshot(tmp_path / "out")
