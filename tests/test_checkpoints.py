# SPDX-License-Identifier: Apache-2.0
"""Reading and writing safetensors: equal to the safetensors package, and unbreakable."""

import errno
import fnmatch
import hashlib
import json
import os
import pickle
from pathlib import Path

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from jqx.errors import InputError
from jqx_interop.checkpoints import (
    DTYPES,
    ShardWriter,
    TensorOut,
    check_tensors,
    digest,
    dtype_name,
    index_json,
    model_dtype,
    open_checkpoint,
    parse_size,
    plan_shards,
    small_files,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """One array of every dtype, names and dtypes in no order, with empty and scalar shapes."""
    rng = np.random.default_rng(seed)
    result = {}
    for i, dtype in enumerate(rng.permutation(list(DTYPES))):
        shape = [(3, 5), (), (0, 4), (7,)][i % 4]
        raw = rng.integers(0, 2 if dtype == "BOOL" else 256, (*shape, DTYPES[dtype].itemsize))
        result[f"t{rng.integers(1000)}.{i}"] = raw.astype(np.uint8).view(DTYPES[dtype])[..., 0]
    return result


def outs(tensors: dict[str, np.ndarray]) -> list[TensorOut]:
    return [TensorOut(n, dtype_name(a.dtype), a.shape) for n, a in tensors.items()]


def write(path: Path, tensors: dict[str, np.ndarray], max_shard_size: str = "10GB") -> None:
    path.mkdir(exist_ok=True)
    with ShardWriter(path, plan_shards(outs(tensors), max_shard_size)) as writer:
        for name, array in reversed(tensors.items()):
            writer.write(name, array)
        writer.finish()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model directory of two shards."""
    path = tmp_path / "model"
    rng = np.random.default_rng(1)
    write(path, {f"w{i}": rng.random((8, 8), np.float32) for i in range(4)}, "512")
    (path / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    return path


def refused(path: Path | str, *phrases: str) -> str:
    """The one line with which `path` is refused; it has all the phrases."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    for phrase in (str(path), *phrases):
        assert phrase in message
    return message


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


# --- what is refused


def test_a_directory_that_is_not_there():
    refused("/no/such/place", "no such directory", "not a Hub id")


def test_a_file_instead_of_a_directory(model: Path):
    refused(model / "config.json", "is a file")


def test_no_configuration(model: Path):
    (model / "config.json").unlink()
    refused(model, "no config.json")


def test_a_broken_configuration_names_line_and_column(model: Path):
    (model / "config.json").write_text('{\n "a": 1,\n "b" 2}')
    refused(model, "config.json is not JSON", "line 3 column 6")
    (model / "config.json").write_text("[1]")
    refused(model, "config.json holds a list")
    (model / "config.json").write_bytes(b'{"a": "\xff"}')
    refused(model, "config.json is not JSON")


def test_pickles_are_never_opened(model: Path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(model / "boom"),)

    for file in model.glob("model*"):
        file.unlink()
    refused(model, "no safetensors file")
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(model, "pytorch_model.bin", "convert to safetensors")
    assert not (model / "boom").exists()


def test_a_pointer_of_git_lfs(model: Path):
    (model / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(model, SINGLE, "git lfs pull")


def test_every_problem_is_in_the_one_line(model: Path):
    (model / "config.json").write_text("{")
    (model / "model-00001-of-00002.safetensors").unlink()
    (model / "model-00002-of-00002.safetensors").write_bytes(b"short")
    refused(model, "config.json is not JSON", "00001-of-00002.safetensors is missing", "truncated")


def test_many_problems_are_counted(model: Path):
    index = json.loads((model / INDEX).read_text())
    shard = index["weight_map"]["w0"]
    index["weight_map"] |= {f"ghost{i}": shard for i in range(20)}
    (model / INDEX).write_text(json.dumps(index))
    refused(model, f"{INDEX} says {shard} holds 'ghost0', which it does not", "... and 16 more")


def test_an_index_that_does_not_fit(model: Path):
    index = json.loads((model / INDEX).read_text())
    del index["weight_map"]["w1"]
    (model / INDEX).write_text(json.dumps(index))
    refused(model, "model-00001-of-00002.safetensors holds 'w1', not in " + INDEX)
    (model / INDEX).write_text(
        '{"weight_map": {"w0": "../model.safetensors", "w1": "/etc/passwd"}}'
    )
    refused(model, "names '../model.safetensors'", "names '/etc/passwd'")
    (model / INDEX).write_text('{"metadata": {}}')
    refused(model, "has no weight_map")
    (model / INDEX).write_text("nothing")
    refused(model, f"{INDEX} is not JSON")


def test_shards_without_an_index(model: Path):
    (model / INDEX).unlink()
    assert len(open_checkpoint(model).tensors) == 4
    (model / "model-00001-of-00002.safetensors").rename(model / "model-00003-of-00003.safetensors")
    refused(model, "model-00001-of-00002.safetensors is missing", "model-00001-of-00003")


def test_a_tensor_in_two_shards(model: Path):
    (model / INDEX).unlink()
    first = model / "model-00001-of-00002.safetensors"
    (model / "model-00002-of-00002.safetensors").write_bytes(first.read_bytes())
    refused(model, "tensor 'w0' is in model-00001-of-00002.safetensors and in model-00002")


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


CORRUPT = {
    "unknown dtype": ({"w": entry(dtype="F4")}, "unknown dtype 'F4'"),
    "dtype no string": ({"w": entry(dtype=7)}, "unknown dtype 7"),
    "negative shape": ({"w": entry(shape=(-2,))}, "has the shape [-2]"),
    "fractional shape": ({"w": entry(shape=(2.0,))}, "has the shape [2.0]"),
    "truth in shape": ({"w": entry(shape=(True, 2))}, "has the shape [True, 2]"),
    "huge shape": ({"w": entry(shape=(10**30,))}, "has the shape"),
    "overflowing shape": ({"w": entry(shape=[2**62] * 400)}, "needs far too many bytes"),
    "wrong byte count": ({"w": entry(shape=(3,))}, "needs 12 bytes for F32 [3]"),
    "one offset": ({"w": entry(offsets=(0,))}, "has the offsets [0]"),
    "backward offsets": ({"w": entry(offsets=(8, 0))}, "has the offsets [8, 0]"),
    "no offsets": ({"w": {"dtype": "F32", "shape": [2]}}, "has the offsets None"),
    "no entry": ({"w": 1}, "has no description"),
    "hole": ({"w": entry(offsets=(8, 16))}, "8 bytes before 'w' are a hole"),
    "overlap": ({"v": entry(), "w": entry()}, "'w' overlaps 'v'"),
    "out of range": (
        {"w": entry(), "v": entry(offsets=(8, 16))},
        "is truncated: its header promises",
    ),
    "bytes left over": ({"w": entry(shape=(1,), offsets=(0, 4))}, "4 bytes after the last"),
    "no object": ([], "header is not a JSON object"),
    "a line break": ({"a\nb": 1}, r"tensor 'a\nb'"),
}


def raw_file(header: bytes, data: bytes = bytes(8)) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_header(model: Path, case: str):
    header, phrase = CORRUPT[case]
    (model / SINGLE).write_bytes(raw_file(json.dumps(header).encode()))
    refused(model, SINGLE, phrase)


@pytest.mark.parametrize(
    ("raw", "phrase"),
    [
        (b"", "truncated: 0 bytes"),
        (b"\x10\0\0\0\0\0\0", "truncated: 7 bytes"),
        (raw_file(b"{}", b"")[:9], "truncated: a header of 2 bytes, a file of 9"),
        (b"\xff" * 20, "header would have 18446744073709551615 bytes"),
        (raw_file(b"\xff\xfe"), "header is not usable JSON"),
        (raw_file(b'{"w": '), "header is not usable JSON"),
        (raw_file(b"[" * 200_000), "nested without end"),
        (raw_file(b'{"w": 1, "w": 2}'), "names 'w' twice"),
        (raw_file(b'{"w": 1' + b"0" * 5000 + b"}"), "is corrupt: its header is not usable JSON"),
        (raw_file(b"{}", b""), "hold no tensors"),
        (raw_file(b"{}"), "8 bytes after the last tensor"),
    ],
)
def test_a_header_that_is_none(model: Path, raw: bytes, phrase: str):
    (model / SINGLE).write_bytes(raw)
    refused(model, phrase)


def test_a_file_cut_anywhere_is_refused(model: Path):
    path = model / "model-00001-of-00002.safetensors"
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for cut in [*range(0, end + 1, 3), end, end + 1, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        refused(model, "model-00001-of-00002.safetensors is truncated")
    path.write_bytes(whole + b"x")
    refused(model, "1 bytes after the last tensor")


@given(position=st.integers(0, 200), value=st.integers(0, 255), seed=st.integers(0, 3))
def test_a_changed_byte_in_a_header_never_gets_past_as_a_crash(
    tmp_path_factory, position: int, value: int, seed: int
):
    path = tmp_path_factory.mktemp("changed")
    write(path, arrays(seed))
    (path / "config.json").write_text("{}")
    raw = bytearray((path / SINGLE).read_bytes())
    raw[position] = value
    (path / SINGLE).write_bytes(raw)
    try:
        found = open_checkpoint(path)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        for name in found.tensors:
            found.read(name)


# --- what is read


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
