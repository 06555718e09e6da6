# SPDX-License-Identifier: Apache-2.0
"""What is exported here, in vLLM and transformers: the same logprobs, as far as an engine's
arithmetic allows, and the same tokens.

    pytest -m engine --engines DIR              DIR made by make_env.sh
    pytest -m engine --engines DIR --engine-model MODEL
"""

from pathlib import Path

import pytest
from engine_cases import CASES, export_all
from engine_results import Here, Outcome, compare, picked, within
from engine_runs import BUNDLED, ENGINES, prompts_of, run

pytestmark = pytest.mark.engine

NOT_HERE = (
    "Failed to find a kernel that can implement",
    "Marlin FP4 not available",
    "static_scaled_fp8_quant() expected at most 0 argument(s)",
    "has no attribute 'silu_and_mul_quant'",
)
"""What an engine says that has no kernel for a format on a CPU."""


@pytest.fixture(scope="module")
def model(request) -> Path:
    given = request.config.getoption("--engine-model")
    return Path(given) if given else BUNDLED


@pytest.fixture(scope="module")
def exports(model, tmp_path_factory) -> dict[str, Path]:
    """The unquantized model and all cases that it can be exported in, by key."""
    made, _ = export_all(CASES, model, tmp_path_factory.mktemp("exports"))
    return {"plain": model, **{case.key: path for case, path in made.items()}}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    return ENGINES[request.param]


@pytest.fixture(scope="module")
def outcomes(engine, exports, engines, model, tmp_path_factory) -> dict[str, Outcome]:
    """What the engine makes of everything that it reads, by key."""
    of = {case.key: case.target for case in CASES}
    read = {
        key: path
        for key, path in exports.items()
        if engine.targets is None or of.get(key) in (None, *engine.targets)
    }
    prompts = prompts_of(model)
    plain = picked(Here(model).logprobs(prompts)[:, :-1], prompts[:, 1:])
    answers = run(engine, engines, read, prompts, tmp_path_factory.mktemp("answers"))
    found = {}
    for key, path in read.items():
        here = Here(path, engine)
        fields = {"kind": here.kind(engine), **compare(answers[key], here, plain, prompts)}
        where = {"model": str(model), "target": of.get(key, ""), "recipe": key}
        found[key] = Outcome(**where, engine=engine.name, dtype=engine.dtype, **fields)
    return found


def test_the_unquantized_model_is_the_same(engine, outcomes):
    mean, _, largest = outcomes["plain"].difference
    assert mean < (1e-5 if engine.dtype == "float32" else 0.05), outcomes["plain"]
    assert largest < (1e-3 if engine.dtype == "float32" else 0.5), outcomes["plain"]


@pytest.mark.parametrize("key", [case.key for case in CASES])
def test_an_export_is_what_it_is_here(key, engine, outcomes):
    if key not in outcomes:
        pytest.skip(f"{engine.name} does not read this layout, or the model has none of it")
    outcome = outcomes[key]
    if outcome.error and not engine.emulate and any(s in outcome.error for s in NOT_HERE):
        pytest.skip(f"{engine.name} on a CPU: {' '.join(outcome.error.split())[:200]}")
    assert outcome.error is None, outcome.error
    assert within(outcome.to_json(), outcomes["plain"].difference), outcome


def test_a_broken_scale_is_seen(engines, exports, tmp_path, model):
    """One scale of one linear is doubled: where a format is exact nothing else explains it."""
    from safetensors.numpy import load_file, save_file

    engine, key = ENGINES["vLLM, emulated"], "compressed-tensors: int4_gptq"
    path = tmp_path / "broken"
    path.mkdir()
    for file in exports[key].iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(exports[key] / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[name] = tensors[name].copy()
    tensors[name][7] *= 2
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    prompts = prompts_of(model)
    answer = run(engine, engines, {"broken": path}, prompts, tmp_path)["broken"]
    plain = picked(Here(model).logprobs(prompts)[:, :-1], prompts[:, 1:])
    here = Here(exports[key], engine)
    fields = {"kind": here.kind(engine), **compare(answer, here, plain, prompts)}
    assert not within(fields, (1e-6, 1e-6, 1e-5))
