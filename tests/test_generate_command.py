# SPDX-License-Identifier: Apache-2.0
"""`jqx generate`: what is printed for one prompt, for several, and for programs."""

import io
import json
import sys

import pytest
from command import jqx
from generating import followers, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("m") / "model", followers([b"uvwxyz", b"]st"]))


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """The same with a chat template."""
    folder = tmp_path_factory.mktemp("t") / "model"
    return write_model(folder, followers([b"uvwxyz", b"]st"]), template=True)


def test_one_prompt_is_printed_alone(model):
    code, out, err = jqx("generate", model, "--prompt", "abc", "-n", 5)
    assert (code, out, err) == (0, "defgh\n", "")


def test_several_are_printed_one_after_another(model, tmp_path):
    (tmp_path / "p.txt").write_text("x" * 70 + "\nw")
    words = ("--prompt", "abc", "--prompt-file", tmp_path / "p.txt", "--prompt", "tu")
    code, out, _ = jqx("generate", model, *words, "-n", 4)
    short = "x" * 57 + "..."
    assert code == 2  # the file fills the context of 64
    (tmp_path / "p.txt").write_text("x" * 50 + "\nw")
    code, out, _ = jqx("generate", model, *words, "-n", 4)
    assert code == 0
    assert out == (
        f"== 1 of 3: abc\ndefg\n\n== 2 of 3: tu\nvwxy\n\n== 3 of 3: {'x' * 50} w\nxyz\n\n"
    ), short


def test_standard_input_is_a_prompt(model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab"))
    assert jqx("generate", model, "--prompt", "-", "-n", 3).out == "cde\n"


def test_json_has_everything(model):
    code, out, _ = jqx("generate", model, "--prompt", "abc", "-n", 5, "--stop", "gh", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["completions"] == [
        {"text": "def", "ids": list(b"defgh"), "reason": "stop", "prompt_tokens": 3}
    ]
    assert found["prefill_seconds"] > 0
    assert found["tokens_per_second"] > 0
    count = 2 * 257 * 64 + 2 * (64 * 64 * 5 + 2 * 64 * 16 + 2 * 64) + 64
    assert found["weight_bytes"] == 4 * count


def test_a_chat_template_is_used_where_there_is_one(talker, model):
    assert jqx("generate", talker, "--prompt", "abc").out == "st\n"
    assert jqx("generate", talker, "--prompt", "abc", "--chat").out == "st\n"
    assert jqx("generate", talker, "--prompt", "abc", "--no-chat", "-n", 2).out == "de\n"
    words = ("--prompt", "Hi", "--system", "Ho", "--json")
    found = json.loads(jqx("generate", talker, *words).out)
    assert found["completions"][0]["prompt_tokens"] == len("[system]Ho[user]Hi[A]")


def test_draws_are_repeated_with_their_seed(model):
    words = ("generate", model, "--prompt", "abc", "-n", 8, "--temperature", 60)
    first = jqx(*words, "--seed", 5).out
    assert jqx(*words, "--seed", 5).out == first
    assert jqx(*words, "--seed", 6).out != first
    assert jqx(*words, "--top-k", 1).out == "defghijk\n"
    assert jqx(*words, "--top-p", 1e-6).out == "defghijk\n"
