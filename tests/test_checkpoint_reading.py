# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints: which files and tensors count, what is known of them, and the Hub."""

import fnmatch
import json
import os
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from checkpoints import INDEX, SINGLE, entry, raw_file, refused, two_shards, write

from jqx.errors import InputError
from jqx_interop.checkpoints import (
    check_tensors,
    digest,
    model_dtype,
    open_checkpoint,
    small_files,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return two_shards(tmp_path / "model")


# --- what is read


def test_shards_are_read_back_through_the_index(model: Path):
    assert sorted(f.name for f in model.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    found = open_checkpoint(model)
    index = json.loads((model / INDEX).read_text())
    assert {n: t.file.name for n, t in found.tensors.items()} == index["weight_map"]
    assert index["metadata"] == {"total_parameters": 256, "total_size": 1024}
    with safetensors.safe_open(model / index["weight_map"]["w2"], "np") as reference:
        np.testing.assert_array_equal(found.read("w2"), reference.get_tensor("w2"))


def test_single_file_comes_before_index_and_other_layouts_are_left_alone(model: Path):
    whole = {n: np.array(open_checkpoint(model).read(n)) for n in ("w0", "w1", "w2", "w3")}
    safetensors.numpy.save_file(whole, model / "consolidated.safetensors")
    assert len(open_checkpoint(model).files) == 2
    (model / INDEX).unlink()
    assert len(open_checkpoint(model).files) == 2
    safetensors.numpy.save_file({"only": np.zeros(2)}, model / SINGLE)
    assert list(open_checkpoint(model).tensors) == ["only"]


def test_release_keeps_views_valid_and_unaligned_tensors_are_copied(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    values = np.arange(10_000, dtype=np.float32)
    header = json.dumps({"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (10_000,), (1, 40_001))})
    (tmp_path / SINGLE).write_bytes(raw_file(header.encode(), b"\7" + values.tobytes()))
    found = open_checkpoint(tmp_path)
    one, many = found.read("a"), found.read("b")
    found.release("a")
    found.release("b")
    np.testing.assert_array_equal(one, [7])
    np.testing.assert_array_equal(many, values)
    assert many.flags.aligned
    assert not many.flags.writeable
    with pytest.raises(KeyError):
        found.read("c")


def test_a_file_that_shrinks_while_it_is_read(model: Path):
    found = open_checkpoint(model)
    os.truncate(found.tensors["w1"].file, 100)
    with pytest.raises(InputError, match="changed while it was read"):
        found.read("w1")


def test_the_tensors_must_be_those_of_the_architecture(model: Path):
    found = open_checkpoint(model)
    expected: dict[str, tuple[int, ...]] = {f"w{i}": (8, 8) for i in range(4)}
    check_tensors(found, expected)
    check_tensors(found, {**expected, "lm_head.weight": (8, 8)}, optional=["lm_head.*"])
    del expected["w3"]
    check_tensors(found, expected, optional={"w3"})
    with pytest.raises(InputError) as caught:
        check_tensors(found, {**expected, "w1": (8, 9), "v": (1,)}, optional=["w1"])
    for phrase in (
        "tensor v is missing",
        "tensor w1 has shape (8, 8), the configuration asks for (8, 9)",
        "tensor w3 is not part of the model",
    ):
        assert phrase in str(caught.value)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ('{"torch_dtype": "float16"}', "F16"),
        ('{"dtype": "torch.bfloat16", "torch_dtype": "float16"}', "BF16"),
        ('{"dtype": null}', "F32"),
        ("{}", "F32"),
    ],
)
def test_the_dtype_of_the_model(model: Path, config: str, dtype: str):
    (model / "config.json").write_text(config)
    assert model_dtype(open_checkpoint(model)) == dtype


def test_a_dtype_that_is_none(tmp_path: Path):
    write(tmp_path, {"w": np.zeros(4, np.uint8)})
    (tmp_path / "config.json").write_text('{"dtype": "int3"}')
    with pytest.raises(InputError, match="\"dtype\": 'int3', known are bfloat16"):
        model_dtype(open_checkpoint(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no tensor is stored as plain floats"):
        model_dtype(open_checkpoint(tmp_path))


def test_small_files_are_those_an_export_carries_along(model: Path):
    carried = [
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
        *("generation_config.json", "chat_template.jinja", "README.md", "LICENSE", "merges.txt"),
    ]
    left = [
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "a.pt", "b.pth", "c.ckpt", "d.h5"),
        *("e.msgpack", "f.gguf", "g.onnx", "h.pkl", "modeling_x.py", ".gitattributes"),
        *("hf_quant_config.json", "extra.safetensors"),
    ]
    for name in (*carried, *left):
        (model / name).write_bytes(b"x")
    (model / "original").mkdir()
    found = open_checkpoint(model)
    assert [file.name for file in small_files(found)] == sorted(carried)


def test_the_digest_changes_with_anything_that_matters(model: Path):
    before = digest(open_checkpoint(model))
    assert digest(open_checkpoint(model)) == before
    (model / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float16"}')
    second = digest(open_checkpoint(model))
    shard = model / "model-00001-of-00002.safetensors"
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    assert len({before, second, digest(open_checkpoint(model))}) == 3


# --- the Hub


def test_a_hub_id_is_fetched_without_code_or_pickles(model: Path, monkeypatch):
    asked = []

    def snapshot_download(repo: str, **options: object) -> str:
        asked.append((repo, options))
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert len(open_checkpoint("some-org/some.model").tensors) == 4
    [(repo, options)] = asked
    assert repo == "some-org/some.model"
    for name in ("modeling_x.py", "pytorch_model.bin", "model.pt", ".gitattributes"):
        assert not any(fnmatch.fnmatch(name, p) for p in options["allow_patterns"])
    for name in ("model-00001-of-00002.safetensors", INDEX, "config.json", "tokenizer.model"):
        assert any(fnmatch.fnmatch(name, p) for p in options["allow_patterns"])
        assert not any(fnmatch.fnmatch(name, p) for p in options["ignore_patterns"])


def test_a_hub_id_that_cannot_be_had_is_one_line(monkeypatch):
    def snapshot_download(repo: str, **options: object) -> str:
        raise OSError("no route to host\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    refused("some-org/model", "no such directory", "no route to host at all")


def test_the_local_cache_is_enough(model: Path, tmp_path: Path, monkeypatch):
    cache = tmp_path / "cache"
    repo = cache / "models--some-org--model"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    model.rename(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert len(open_checkpoint("some-org/model").tensors) == 4
