# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that llm-compressor writes, read here: the same logprobs as in transformers and vLLM.

pytest -m engine --engines DIR --writers DIR2         DIR2 made by make_writer_env.sh
"""

import json
import subprocess
from pathlib import Path

import pytest
from engine_results import Here, compare, picked, within
from engine_runs import BUNDLED, ENGINES, HERE, prompts_of, run

from jqx.errors import InputError

pytestmark = pytest.mark.engine

LINEARS = {"targets": ["Linear"], "ignore": ["lm_head"]}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
KV = FLOAT8 | {"strategy": "tensor", "dynamic": False}
MIXED = {
    "group_0": {
        "targets": [r"re:.*mlp\..*_proj"],
        "weights": FLOAT8 | {"strategy": "channel"},
        "input_activations": FLOAT8 | {"strategy": "token", "dynamic": True},
    },
    "group_1": {
        "targets": [r"re:.*self_attn\..*_proj"],
        "weights": {
            "num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True
        },
    },
}  # fmt: skip


def rounded(scheme, **more):
    return [["QuantizationModifier", {**LINEARS, "scheme": scheme, **more}]]


CHECKPOINTS = {
    **{name: rounded(name) for name in ("W4A16", "W4A16_ASYM", "W8A8", "FP8", "FP8_DYNAMIC")},
    **{name: rounded(name) for name in ("NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8")},
    "FP8_BLOCK": rounded("FP8_BLOCK"),
    "FP8_KV": rounded("FP8", kv_cache_scheme=KV),
    "GPTQ": [["GPTQModifier", {**LINEARS, "scheme": "W4A16"}]],
    "GPTQ_STATIC": [["GPTQModifier", {**LINEARS, "scheme": "W4A16", "actorder": "static"}]],
    "SMOOTH": [["SmoothQuantModifier", {"smoothing_strength": 0.5}], *rounded("W8A8")],
    "MIXED": [["QuantizationModifier", {"ignore": ["lm_head"], "config_groups": MIXED}]],
}
"""Key -> modifiers of llm-compressor."""

REFUSED = {
    "W4A8": "no pair of formats here",
    "W8A16": "group_size 128, strategy group with no inputs, which is no pair of formats here",
    "MXFP8A16": "group_size 32, strategy group with no inputs, which is no pair of formats here",
}
"""Scheme -> what is said of it."""

FLOAT32 = (2e-6, 2e-6, 2e-5)
"""The difference of the unquantized model, in float32."""

EMULATED = ENGINES["vLLM, emulated"]
SYMMETRIC = [key for key in CHECKPOINTS if key != "W4A16_ASYM"]
"""What the emulated kernels know; zero points they do not."""


@pytest.fixture(scope="module")
def foreign(writers, tmp_path_factory) -> Path:
    """A directory with all checkpoints, written by llm-compressor."""
    folder = tmp_path_factory.mktemp("foreign")
    request, out = folder / "request.json", folder / "out.jsonl"
    refused = {name: rounded(name) for name in REFUSED}
    asked = {
        "model": str(BUNDLED),
        "prompts": prompts_of(BUNDLED, 16).tolist(),
        "checkpoints": CHECKPOINTS | refused,
        "folder": str(folder),
    }
    request.write_text(json.dumps(asked), encoding="utf-8")
    command = [writers / "bin" / "python", "-E", HERE / "write_foreign.py", request, out]
    subprocess.run(command, check=True, capture_output=True, timeout=1800)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if "error" in line] == []
    return folder


@pytest.fixture(scope="module", params=["transformers", "vLLM, emulated"])
def answers(request, foreign, engines, tmp_path_factory):
    """An engine, and what it says of all of them."""
    engine = ENGINES[request.param]
    keys = SYMMETRIC if engine.emulate else CHECKPOINTS
    read = {"plain": BUNDLED, **{key: foreign / key for key in keys}}
    prompts = prompts_of(BUNDLED)
    return engine, run(engine, engines, read, prompts, tmp_path_factory.mktemp("answers"))


@pytest.mark.parametrize("key", CHECKPOINTS)
def test_a_foreign_checkpoint_means_here_what_it_means_there(key, foreign, answers):
    engine, said = answers
    if key not in said:
        pytest.skip("the emulated kernels know no zero points")
    prompts = prompts_of(BUNDLED)
    table = Here(BUNDLED).logprobs(prompts)
    plain = picked(table[:, :-1], prompts[:, 1:])
    here = Here(foreign / key, engine)
    fields = {"kind": here.kind(engine), **compare(said[key], here, plain, prompts)}
    assert fields["error"] is None, fields["error"]
    assert within(fields, FLOAT32), fields


@pytest.mark.parametrize("scheme", REFUSED)
def test_what_is_not_read_is_refused_by_name(scheme, foreign):
    with pytest.raises(InputError, match=REFUSED[scheme]):
        Here(foreign / scheme)
