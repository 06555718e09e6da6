# SPDX-License-Identifier: Apache-2.0
"""Token ids and recorded inputs: what each file gives, and every way it is refused."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from calibration import load, refused

from jqx.errors import InputError
from jqx_interop.data import Activations

# --- token ids


def test_an_array_of_batches_is_taken_as_given(tmp_path: Path):
    ids = np.arange(24).reshape(2, 3, 4)
    np.save(tmp_path / "ids.npy", ids)
    found = load(tmp_path / "ids.npy", vocab=24)
    assert len(found) == 2
    assert found.tokens == 24
    for batch, expected in zip(found, ids, strict=True):
        assert batch.dtype == np.int32
        np.testing.assert_array_equal(batch, expected)


def test_an_array_of_sequences_is_one_sequence_a_batch(tmp_path: Path):
    np.save(tmp_path / "ids.npy", np.arange(8, dtype=">u2").reshape(2, 4))
    found = load(tmp_path / "ids.npy")
    assert [batch.tolist() for batch in found] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def test_the_digest_is_that_of_the_ids_and_their_batches(tmp_path: Path):
    ids = np.arange(8).reshape(2, 1, 4)
    np.save(tmp_path / "a.npy", ids)
    np.save(tmp_path / "b.npy", ids[:, 0].astype(np.uint8))
    np.save(tmp_path / "c.npy", ids.reshape(1, 2, 4))
    np.save(tmp_path / "d.npy", ids[::-1])
    digests = [load(tmp_path / f"{name}.npy").digest for name in "abcd"]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("value", "phrases"),
    [
        (12, ["token id 12 at position 3 of sequence 1 in batch 2", "the vocabulary of 12"]),
        (-1, ["token id -1 at position 3 of sequence 1 in batch 2", "the vocabulary of 12"]),
    ],
)
def test_ids_outside_the_vocabulary(tmp_path: Path, value: int, phrases: list[str]):
    ids = np.zeros((3, 2, 4), np.int64)
    ids[2, 1, 3] = value
    np.save(tmp_path / "ids.npy", ids)
    refused(tmp_path / "ids.npy", None, "ids.npy", *phrases)


@pytest.mark.parametrize(
    ("array", "phrase"),
    [
        (np.zeros((2, 3)), "holds float64, not integers"),
        (np.zeros((2, 3), bool), "holds bool, not integers"),
        (np.zeros(3, int), "has the shape (3,)"),
        (np.zeros((1, 1, 1, 3), int), "has the shape (1, 1, 1, 3)"),
    ],
)
def test_arrays_that_are_no_token_ids(tmp_path: Path, array: np.ndarray, phrase: str):
    np.save(tmp_path / "ids.npy", array)
    refused(tmp_path / "ids.npy", None, phrase, "[batches, batch, length]")


def test_objects_are_never_unpickled(tmp_path: Path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    np.save(tmp_path / "ids.npy", np.array([[Bomb()]], object), allow_pickle=True)
    refused(tmp_path / "ids.npy", None, "is not a usable .npy file")
    assert not (tmp_path / "boom").exists()


def test_files_that_only_say_npy(tmp_path: Path):
    file = tmp_path / "ids.npy"
    for raw in (b"no array", b"\x93NUMPY\x01\x00\x04\x00{{{{", b"\x80\x04K\x01."):
        file.write_bytes(raw)
        refused(file, None, "is not a usable .npy file")
    np.save(file, np.zeros((4, 4), int))
    file.write_bytes(file.read_bytes()[:-1])
    refused(file, None, "is not a usable .npy file")
    with open(file, "wb") as archive:
        np.savez(archive, ids=np.zeros((2, 2), int))
    refused(file, None, "is not a usable .npy file")


# --- recorded inputs


def test_recorded_inputs_come_in_the_order_of_batches(tmp_path: Path):
    rng = np.random.default_rng(0)
    recorded = {
        f"layers.{layer}.mlp|{batch}": rng.random((2, 3, 8), np.float32).astype(ml_dtypes.bfloat16)
        for layer in (10, 9, 0)
        for batch in (10, 2, 0, 9, 1)
    }
    safetensors.numpy.save_file(recorded, tmp_path / "acts.safetensors")
    found = Activations(tmp_path / "acts.safetensors")
    assert found.modules() == ("layers.0.mlp", "layers.9.mlp", "layers.10.mlp")
    assert found.width("layers.9.mlp") == 8
    batches = list(found.batches("layers.9.mlp"))
    for array, number in zip(batches, (0, 1, 2, 9, 10), strict=True):
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, recorded[f"layers.9.mlp|{number}"])
    with pytest.raises(KeyError):
        next(found.batches("layers.1.mlp"))
    digest = found.digest
    assert digest == Activations(tmp_path / "acts.safetensors").digest
    os.utime(tmp_path / "acts.safetensors", ns=(0, 0))
    assert digest != found.digest


@pytest.mark.parametrize(
    ("keys", "phrases"),
    [
        ({"a": (2,)}, ["key 'a' is not <module>|<batch>"]),
        (
            {"|0": (2,), "a|x": (2,), "a|-1": (2,), "a|b|0": (2,), "a|": (2,)},
            ["'a|x' is not", "and 1 more"],
        ),
        ({"a|1": (2,), "a|01": (2,)}, ["'a|1' repeats batch 1 of 'a|01'"]),
        ({"a|0": (3, 2), "a|1": (3, 4)}, ["key 'a|1' has 4 channels, 'a|0' has 2"]),
        ({"a|0": ()}, ["key 'a|0' has the shape ()"]),
        ({"a|0": (0, 4)}, ["key 'a|0' has the shape (0, 4)"]),
        ({}, ["holds no tensors"]),
    ],
)
def test_keys_that_are_none(tmp_path: Path, keys: dict, phrases: list[str]):
    file = tmp_path / "acts.safetensors"
    safetensors.numpy.save_file({k: np.zeros(s, np.float16) for k, s in keys.items()}, file)
    with pytest.raises(InputError) as caught:
        Activations(file)
    for phrase in ("acts.safetensors", *phrases):
        assert phrase in str(caught.value)


def test_recorded_files_that_are_none(tmp_path: Path):
    file = tmp_path / "acts.safetensors"
    with pytest.raises(InputError, match="cannot be read: No such file"):
        Activations(file)
    safetensors.numpy.save_file({"a|0": np.zeros(4, np.int32)}, file)
    with pytest.raises(InputError, match="'a|0' holds I32, not floating-point inputs"):
        Activations(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="acts.safetensors is truncated"):
        Activations(file)


def test_the_shared_recordings_are_read(shared: Path):
    found = Activations(shared / "golden" / "acts.safetensors")
    assert len(found.modules()) == 14
    assert all(len(list(found.batches(module))) == 4 for module in found.modules())
    ids = load(shared / "golden" / "calib_ids.npy", vocab=512)
    assert [batch.shape for batch in ids] == [(4, 64)] * 4
