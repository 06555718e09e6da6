# SPDX-License-Identifier: Apache-2.0
"""Writing safetensors: byte for byte as the safetensors package and the reference tool do, and with
room for everything before the first tensor.
"""

import errno
import hashlib
import os
from pathlib import Path

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from checkpoints import SINGLE, arrays, write
from hypothesis import given
from hypothesis import strategies as st

from jqx.errors import InputError
from jqx_interop.checkpoints import (
    DTYPES,
    ShardWriter,
    TensorOut,
    index_json,
    open_checkpoint,
    parse_size,
    plan_shards,
)

# --- equal to the safetensors package


@pytest.mark.parametrize("seed", range(4))
def test_a_file_has_the_bytes_of_the_reference_writer(tmp_path: Path, seed: int):
    tensors = arrays(seed)
    write(tmp_path, tensors)
    expected = safetensors.numpy.save(tensors, {"format": "pt"})
    assert (tmp_path / SINGLE).read_bytes() == expected


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda n: n != "__metadata__"
)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
entries = st.dictionaries(names, st.tuples(st.sampled_from(list(DTYPES)), shapes), min_size=1)


@given(entries=entries, seed=st.integers(0, 2**32 - 1))
def test_what_is_written_is_read_back_and_the_reference_agrees(tmp_path_factory, entries, seed):
    path = tmp_path_factory.mktemp("round")
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (dtype, shape) in entries.items():
        raw = rng.integers(0, 2 if dtype == "BOOL" else 256, (*shape, DTYPES[dtype].itemsize))
        tensors[name] = raw.astype(np.uint8).view(DTYPES[dtype]).reshape(shape)
    write(path, tensors)
    (path / "config.json").write_text("{}")
    raw = (path / SINGLE).read_bytes()
    assert raw == safetensors.numpy.save(tensors, {"format": "pt"})
    found = open_checkpoint(path)
    reference = dict(safetensors.deserialize(raw))
    assert set(found.tensors) == set(tensors) == set(reference)
    for name, array in tensors.items():
        mine = found.read(name)
        assert mine.dtype == array.dtype
        assert mine.shape == array.shape
        assert not mine.flags.writeable
        assert mine.tobytes() == array.tobytes() == bytes(reference[name]["data"])
        info = found.tensors[name]
        assert raw[info.start : info.end] == array.tobytes()
        assert (info.dtype, list(info.shape)) == (
            reference[name]["dtype"],
            reference[name]["shape"],
        )


def test_exports_of_the_reference_tool_are_rewritten_byte_for_byte(shared: Path, tmp_path: Path):
    checked = 0
    for file in sorted((shared / "golden").glob("*/model.safetensors")):
        source = open_checkpoint(file.parent)
        tensors = {name: source.read(name) for name in source.tensors}
        write(tmp_path, tensors)
        assert (tmp_path / SINGLE).read_bytes() == file.read_bytes(), file
        checked += 1
    assert checked > 30


# --- shards and index

BLOCK = {
    **{
        f"self_attn.{name}_proj": (rows, 256)
        for name, rows in zip("qkvo", (256, 128, 128, 256), strict=True)
    },
    **{"mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256), "mlp.down_proj": (256, 512)},
}


def llama(fmt: str) -> list[TensorOut]:
    """The tensors of a two-layer Llama as exported in `fmt`, in state_dict order."""
    tensors = [TensorOut("model.embed_tokens.weight", "BF16", (512, 256))]
    for layer in range(2):
        for linear, (n, k) in BLOCK.items():
            path = f"model.layers.{layer}.{linear}."
            if fmt == "fp8":
                tensors.append(TensorOut(path + "weight", "F8_E4M3", (n, k)))
                tensors.append(TensorOut(path + "weight_scale", "F32", ()))
                tensors.append(TensorOut(path + "input_scale", "F32", ()))
            else:
                tensors.append(TensorOut(path + "weight", "U8", (n, k // 2)))
                tensors.append(TensorOut(path + "weight_scale", "F8_E4M3", (n, k // 16)))
                tensors.append(TensorOut(path + "input_scale", "F32", ()))
                tensors.append(TensorOut(path + "weight_scale_2", "F32", ()))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors.append(TensorOut(f"model.layers.{layer}.{norm}.weight", "BF16", (256,)))
    tensors.append(TensorOut("model.norm.weight", "BF16", (256,)))
    return [*tensors, TensorOut("lm_head.weight", "BF16", (512, 256))]


# Made by ModelOpt 0.47 and transformers 5.14, max_shard_size="500KB": sha256 of the index and of
# each file's header, and the files' sizes.
SHARDED = {
    "fp8": (
        "9e05666499524a47",
        ["26d168a9cfab27a2", "bdfbf80532f177a9", "57862c92b4d6f61f", "f29049f8e85a2c20"],
        [460128, 494304, 494896, 262264],
    ),
    "nvfp4": (
        "3ab5d54602dd325e",
        ["f4b74574db69dbcf", "274f1dcaeb033ce1", "f29049f8e85a2c20"],
        [448696, 486024, 262264],
    ),
}


@pytest.mark.parametrize("fmt", SHARDED)
def test_shards_and_index_are_those_of_the_reference_tool(fmt: str):
    index, headers, sizes = SHARDED[fmt]
    plans = plan_shards(llama(fmt), "500KB")
    assert [plan.size for plan in plans] == sizes
    assert [hashlib.sha256(plan.header).hexdigest()[:16] for plan in plans] == headers
    assert hashlib.sha256(index_json(plans)).hexdigest()[:16] == index


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=30), limit=st.integers(1, 40))
def test_the_split_is_that_of_huggingface_hub(sizes: list[int], limit: int):
    tensors = {f"t{i}": TensorOut(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)}
    split = huggingface_hub.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    mine = {
        plan.file: sorted(t.name for t in plan.tensors)
        for plan in plan_shards(tensors.values(), limit)
    }
    assert mine == {file: sorted(names) for file, names in split.filename_to_tensors.items()}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10GB", 10**10),
        ("4GiB", 2**32),
        ("500 KB", 500_000),
        ("0.5mb", 500_000),
        ("77", 77),
        (9, 9),
    ],
)
def test_sizes(text: str | int, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "ten GB", "-1GB", "0", "5 XB", "nan", "inf", "1e999"])
def test_a_size_that_is_none_is_refused(text: str):
    with pytest.raises(InputError, match="is not a size"):
        parse_size(text)


# --- the writer


def test_the_writer_checks_names_dtypes_and_shapes(tmp_path: Path):
    with ShardWriter(tmp_path, plan_shards([TensorOut("w", "BF16", (2, 3))])) as writer:
        with pytest.raises(KeyError):
            writer.write("v", np.zeros((2, 3)))
        with pytest.raises(
            ValueError, match=r"w is planned as BF16 \(2, 3\), got float32 \(2, 3\)"
        ):
            writer.write("w", np.zeros((2, 3), np.float32))
        with pytest.raises(ValueError, match=r"got bfloat16 \(3, 2\)"):
            writer.write("w", np.zeros((3, 2), ml_dtypes.bfloat16))
        with pytest.raises(ValueError, match="1 tensors were never written: w"):
            writer.finish()
        strided = np.arange(6, dtype=np.float32).reshape(3, 2).T.astype(ml_dtypes.bfloat16)
        writer.write("w", strided)
        writer.finish()
    loaded = safetensors.deserialize((tmp_path / SINGLE).read_bytes())
    assert bytes(loaded[0][1]["data"]) == np.ascontiguousarray(strided).tobytes()


def test_a_file_has_its_full_size_before_the_first_tensor(tmp_path: Path):
    plans = plan_shards([TensorOut("w", "F32", (1000,)), TensorOut("v", "F32", (1000,))], "4000")
    with ShardWriter(tmp_path, plans):
        assert [(tmp_path / p.file).stat().st_size for p in plans] == [p.size for p in plans]
        blocks = [(tmp_path / p.file).stat().st_blocks * 512 for p in plans]
        assert all(b >= p.size for b, p in zip(blocks, plans, strict=True))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path):
    plans = plan_shards([TensorOut("v", "F32", (4,)), TensorOut("w", "F32", (2**48,))], "1GB")
    with pytest.raises(InputError, match="no room") as caught:
        ShardWriter(tmp_path, plans)
    for phrase in (str(tmp_path), str(sum(p.size for p in plans)), "are free"):
        assert phrase in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_while_files_are_made(tmp_path: Path, monkeypatch):
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="No space left on device"):
        ShardWriter(tmp_path, plan_shards([TensorOut("w", "F32", (4,))]))
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_preallocation(tmp_path: Path, monkeypatch):
    def unsupported(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    write(tmp_path, {"w": np.arange(4.0)})
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / SINGLE)["w"], range(4))


def test_a_second_writer_goes_on(tmp_path: Path):
    plans = plan_shards([TensorOut("v", "F32", (4,)), TensorOut("w", "F32", (4,))])
    with ShardWriter(tmp_path, plans) as writer:
        writer.write("v", np.arange(4, dtype=np.float32))
        writer.sync()
    with ShardWriter(tmp_path, plans, finished=["v"]) as writer:
        writer.write("w", np.ones(4, np.float32))
        writer.finish()
    loaded = safetensors.numpy.load_file(tmp_path / SINGLE)
    np.testing.assert_array_equal(loaded["v"], range(4))
    np.testing.assert_array_equal(loaded["w"], [1] * 4)
    other = plan_shards([TensorOut("v", "F32", (4,)), TensorOut("u", "F32", (4,))])
    with pytest.raises(InputError, match="Pass --restart"):
        ShardWriter(tmp_path, other, finished=["v"])
    (tmp_path / SINGLE).unlink()
    with pytest.raises(InputError, match="not as this run left it"):
        ShardWriter(tmp_path, plans, finished=["v"])
