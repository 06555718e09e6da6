# SPDX-License-Identifier: Apache-2.0
"""Prompts and settings that mean nothing are refused in one line, before weights are read."""

import io
import json
import sys

import numpy as np
import pytest
from command import jqx, refused
from generating import write_model
from safetensors.numpy import load_file, save_file

import jqx_interop as ji
from jqx.errors import InputError
from jqx_interop.generation.prompts import listed, token_ids


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        ((), ("no prompt is given", "--prompt")),
        (("--prompt", ""), "prompt 1 is empty"),
        (("--prompt", "a", "--prompt", ""), "prompt 2 is empty"),
        (("--prompt", "a", "--top-p", 0), ("top_p is 0.0", "above 0")),
        (("--prompt", "a", "--top-p", 1.1), "top_p is 1.1"),
        (("--prompt", "a", "--top-p", "nan"), "top_p is nan"),
        (("--prompt", "a", "--top-k", -1), "top_k is -1"),
        (("--prompt", "a", "--temperature", -0.5), "temperature is -0.5"),
        (("--prompt", "a", "--temperature", "inf"), "temperature is inf"),
        (("--prompt", "a", "--max-new-tokens", 0), "max_new_tokens is 0"),
        (("--prompt", "a", "--seed", -1), "seed is -1"),
        (("--prompt", "a", "--stop", ""), "stop is"),
        (("--prompt", "a", "--chat"), ("no chat template", "--no-chat")),
        (("--prompt", "a", "--system", "s"), ("--system", "--chat")),
        (("--prompt", "a" * 64), ("64 tokens", "max_position_embeddings, is 64", "shorten")),
        (("--prompt", "a", "--compute", "bf15"), "bf15"),
        (("--prompt-file", "nowhere.txt"), "nowhere.txt"),
    ],
    ids=lambda x: " ".join(map(str, x))[:40] if isinstance(x, tuple) else "",
)
def test_options(model, options, saying):
    refused("generate", model, *options, saying=saying)


def test_a_file_that_is_no_text(model, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    refused("generate", model, "--prompt-file", tmp_path / "p.txt", saying=("p.txt", "UTF-8"))


def test_weights_that_are_no_numbers(model):
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("1.mlp.down_proj.weight"))
    tensors[name][3, 5] = np.nan
    save_file(tensors, file)
    refused("generate", model, "--prompt", "a", "-n", 4, saying=("not finite", "NaN"))


def test_layers_beyond_reason(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    refused("generate", model, "--prompt", "a", saying=("num_hidden_layers 1000000000", "10000"))


def test_no_model(tmp_path):
    refused("generate", tmp_path / "none", "--prompt", "a", saying="none")


def test_no_tokenizer(model):
    (model / "tokenizer.json").unlink()
    refused("generate", model, "--prompt", "a", saying=("no tokenizer.json", "token ids"))
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        ji.generate(model, [1, 2], ji.Sampling(stop=("a",)))


def test_the_tokenizer_of_another_model(tmp_path):
    model = write_model(tmp_path / "m", np.arange(100), vocab_size=100)
    saying = ("token id 120", "vocabulary has 100", "another model")
    refused("generate", model, "--prompt", "xyz", saying=saying)


@pytest.mark.parametrize(
    ("prompts", "saying"),
    [
        ([], "no prompt"),
        ([[]], "prompt 1 is empty"),
        ([1, -1], "token id -1"),
        ([[1], [2, 257]], "prompt 2 has the token id 257"),
        ([[{"role": "user", "content": "a"}]], "chat template"),
    ],
)
def test_prompts(model, prompts, saying):
    with pytest.raises(InputError, match=saying):
        ji.generate(model, prompts)


@pytest.mark.parametrize("prompts", [[[1.5]], [["a"]], [[True]], [3, "a"], [None]])
def test_prompts_of_no_kind(prompts):
    with pytest.raises(InputError, match="prompt 1 is no text"):
        token_ids(listed(prompts), None, None, 10)


@pytest.mark.parametrize(
    ("says", "saying"),
    [
        ({"do_sample": True, "temperature": -1}, "temperature is -1"),
        ({"do_sample": True, "top_p": "x"}, "generation_config.json"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [1, None]}, "eos_token_id"),
    ],
)
def test_what_the_checkpoint_says(tmp_path, says, saying):
    model = write_model(tmp_path / "m", says=says)
    refused("generate", model, "--prompt", "a", saying=saying)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_generation_config_that_is_none(model, text):
    (model / "generation_config.json").write_text(text)
    refused("generate", model, "--prompt", "a", saying=("generation_config.json", "JSON"))


def test_a_template_that_refuses(tmp_path):
    model = write_model(tmp_path / "m", template=True)
    template = {"chat_template": "{{ raise_exception('no') }}"}
    (model / "tokenizer_config.json").write_text(json.dumps(template))
    refused("generate", model, "--prompt", "a", saying=("prompt 1", "template", "no"))


def test_a_quantized_checkpoint_without_a_scale(model, tmp_path):
    out = tmp_path / "q"
    assert jqx("quantize", model, out, "--qformat", "int8_weight_only").code == 0
    from safetensors.numpy import load_file, save_file

    tensors = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    del tensors[name]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    refused("generate", out, "--prompt", "a", saying=name)


@pytest.mark.parametrize("stream", ["argument", "standard input"])
def test_a_prompt_that_is_not_utf8(model, stream, monkeypatch):
    text = "\udcff" if stream == "argument" else "-"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\udcfe"))
    refused("generate", model, "--prompt", text, saying=("prompt 1", "UTF-8"))


def test_standard_input_that_is_closed(model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    refused("generate", model, "--prompt", "-", saying="closed")
