# SPDX-License-Identifier: Apache-2.0
"""Every family quantized, stored and read again: the logits are those of the model in memory, and
the engines that read a format accept the files.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import family_checkpoints
import jax.numpy as jnp
import numpy as np
import pytest
from command import jqx as run
from golden import make_families
from tiny_families import DENSE, MIXTURES, ONE_EACH

import jqx
import jqx_interop as ji
from jqx_interop.tables import PROVED

IDS = jnp.asarray(np.random.RandomState(2).randint(0, make_families.VOCAB, (2, 12)), jnp.int32)


class Row(NamedTuple):
    """Options of `jqx quantize`, engines that read what it writes, and how far logits may be from
    those of the original on average, over their spread.
    """

    options: str
    engines: tuple[str, ...]
    farthest: float
    of_experts: bool = True


FORMATS = {
    "fp8": Row("fp8", ("vllm", "sglang", "trtllm"), 0.25),
    "nvfp4": Row("nvfp4", ("vllm", "sglang", "trtllm", "tpu-vllm"), 0.7),
    "int8_sq": Row("int8_sq", (), 0.4),
    "int4_awq": Row("int4_awq --set block=32", (), 0.6),
    "w4a8_awq": Row("w4a8_awq --set block=32", (), 0.6),
    "fp8-kv": Row("fp8 --kv-cache fp8", ("vllm", "sglang", "trtllm"), 0.3),
    "int8_sq-folded": Row("int8_sq --target compressed-tensors", ("vllm",), 0.4, of_experts=False),
    "int4_awq-folded": Row("int4_awq --set block=32 --target awq", ("vllm",), 0.6),
}
IN_ONE_TENSOR: dict[str, dict[str, tuple[str, ...]]] = {
    "llama4": {"nvfp4": ("vllm", "trtllm")},
    **{kind: dict.fromkeys(("fp8", "nvfp4", "fp8-kv"), ()) for kind in ("llama4_text", "gpt_oss")},
}
"""model_type -> format -> the engines that read it, where experts are written in one tensor."""

OTHER_EXPERTS = 0.2
"""How much farther they may be where some tokens go to other experts."""

assert set(PROVED) <= set(FORMATS)
FAMILIES = [*DENSE, *MIXTURES]
ALL = list(itertools.product(FAMILIES, FORMATS))
TURNS = [pair for i, pair in enumerate(ALL) if i % len(FORMATS) == i // len(FORMATS) % len(FORMATS)]
TURNS = TURNS[::2] + TURNS[1::2][-4:]
"""A format for every second family, in turns, and for some more with experts: the rest takes
minutes.
"""


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """model_type -> its checkpoint, made once."""

    def write(folder: Path, kind: str) -> Path:
        case = family_checkpoints.CASES.get(kind, ONE_EACH[kind])
        made = family_checkpoints.write(folder, case)
        (made / "tokenizer.model").write_bytes(b"any")
        return made

    return family_checkpoints.made_once(tmp_path_factory, write)


def logits(model: ji.Model, params=None) -> np.ndarray:
    found = model.apply({"params": model.params if params is None else params}, IDS)
    used = [i for i in range(found.shape[-1]) if i not in model.spec.unused]
    return np.asarray(found)[..., used]


def check_stored(source: Path, out: Path, name: str) -> None:
    """Quantize `source`; what is read again has the logits and the bytes of what was written."""
    row = FORMATS[name]
    done = run(
        "quantize",
        source,
        out,
        "--qformat",
        *row.options.split(),
        "--calib",
        source.parent / "ids.npy",
    )
    assert done.code == 0, done.err
    model, plain = ji.load(out), logits(ji.load(source))
    got = logits(model)
    far = np.mean(np.abs(got - plain)) / np.std(plain)
    assert 1e-4 < far < row.farthest + OTHER_EXPERTS * (model.spec.family in MIXTURES)
    target = row.options.partition("--target ")[2] or "modelopt"
    ji.save(model, out.with_name("again"), target=target)
    again = out.with_name("again")
    np.testing.assert_array_equal(logits(ji.load(again)), got)
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (out / weights).read_bytes()
    said = json.loads(run("inspect", out, "--engine", "all", "--json").out)
    assert said["faults"] == []
    engines = row.engines if row.of_experts or model.spec.family not in MIXTURES else ()
    for engine in IN_ONE_TENSOR.get(model.config["model_type"], {}).get(name, engines):
        assert said["engines"][engine]["loads"], said["engines"][engine]["problems"]


@pytest.mark.parametrize(("kind", "name"), TURNS)
def test_stored_and_read_again(originals, tmp_path: Path, kind: str, name: str):
    check_stored(originals(kind), tmp_path / "out", name)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [pair for pair in ALL if pair not in TURNS])
def test_all_formats_stored_and_read_again(originals, tmp_path: Path, kind: str, name: str):
    check_stored(originals(kind), tmp_path / "out", name)


FUSED = ("granitemoe", "llama4_text", "llama4", "gpt_oss", "dbrx")
"""Families whose experts lie in one tensor, which is quantized while it is read: afterwards each
has linears of its own.
"""


def check_functions(source: Path, out: Path) -> None:
    """By the functions that know no families: what `jqx.quantize` gives has the same logits from
    the disk.
    """
    model = ji.load(source)
    config = jqx.RECIPES["fp8"].config
    kept = (f"{model.spec.names.embed}.weight", "*norm*")
    rules = tuple(jqx.Rule(path_glob=glob, weight=None, input=None, optional=True) for glob in kept)
    config = dataclasses.replace(config, rules=(*config.rules, *rules))
    if model.config["model_type"] in FUSED:
        model = ji.load(source, quantize=config)
    batches = jnp.asarray(np.load(source.parent / "ids.npy"), jnp.int32)
    stats = jqx.calibrate(
        lambda p, x: model.module.apply({"params": p}, x), model.params, batches, config
    )
    params = jqx.quantize(model.params, config, stats)
    ji.save(dataclasses.replace(model, params=params), out)
    np.testing.assert_array_equal(logits(ji.load(out)), logits(model, params))


SOME = [*[kind for kind in FAMILIES if kind not in FUSED][::4], "granitemoe"]


@pytest.mark.parametrize("kind", SOME)
def test_quantized_in_memory_stored_and_read_again(originals, tmp_path: Path, kind: str):
    check_functions(originals(kind), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in SOME])
def test_all_quantized_in_memory_stored_and_read_again(originals, tmp_path: Path, kind: str):
    check_functions(originals(kind), tmp_path / "out")
