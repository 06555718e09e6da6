# SPDX-License-Identifier: Apache-2.0
"""Prompts go on as the model says: kinds of prompts, where a text ends, what is streamed, what the
checkpoint decides.
"""

import json
import shutil

import numpy as np
import pytest
from command import jqx
from generating import END, byte_tokenizer, followers, write_model
from hypothesis import given
from hypothesis import strategies as st

import jqx_interop as ji
from jqx.models.sampling import Draw
from jqx_interop.checkpoints import bundled_model
from jqx_interop.generation.settings import draw_of
from jqx_interop.generation.text import Detokenizer, Stops

CHARACTERS = "é€😀!"
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory):
    """Letters follow each other up to z, which ends; CHARACTERS follow each other and end."""
    following = followers([b"uvwxyz", CHARACTERS.encode()])
    return write_model(tmp_path_factory.mktemp("model") / "alphabet", following)


def go_on(model, prompts, **sampling):
    return ji.generate(model, prompts, ji.Sampling(**sampling))


def test_a_text_goes_on_to_the_limit_or_the_end(alphabet):
    (found,) = go_on(alphabet, "abc", max_new_tokens=4)
    assert found == ji.Completion(text="defg", ids=tuple(b"defg"), reason="length", prompt_tokens=3)
    (found,) = go_on(alphabet, "qrs", max_new_tokens=20)
    assert found.text == "tuvwxyz"
    assert found.ids == (*b"tuvwxyz", END)
    assert found.reason == "stop"


def test_a_batch_is_its_prompts_one_by_one(alphabet):
    """Some end early, which changes nothing for the others; nothing follows their ends."""
    prompts = ["a", "xy", list(b"mnop"), "s", "abcdefg"]
    said: list[list[str]] = [[] for _ in prompts]
    together = ji.generate(
        alphabet,
        prompts,
        ji.Sampling(max_new_tokens=9),
        on_token=lambda i, text: said[i].append(text),
    )
    model = ji.load(alphabet)
    assert together == [go_on(model, prompt, max_new_tokens=9)[0] for prompt in prompts]
    assert [c.text for c in together] == ["bcdefghij", "z", "qrstuvwxy", "tuvwxyz", "hijklmnop"]
    assert [c.reason for c in together] == ["length", "stop", "length", "stop", "length"]
    assert ["".join(pieces) for pieces in said] == [c.text for c in together]


def test_characters_are_streamed_whole(alphabet):
    said: list[str] = []
    (found,) = ji.generate(
        alphabet, list("é".encode()[:1]), ji.Sampling(), on_token=lambda _, text: said.append(text)
    )
    assert said == ["\ufffd€", "😀", "!"]
    assert found.ids[-1] == END
    (found,) = go_on(alphabet, "é", max_new_tokens=5)
    assert found.text == "€\ufffd"  # the rest of what was held back
    assert found.text == TOKENIZER.decode(list(found.ids))


@given(st.lists(st.integers(0, END), max_size=30))
def test_streamed_text_is_the_text(ids):
    """Whatever the bytes, and nothing that was told is taken back."""
    stream = Detokenizer(TOKENIZER)
    pieces = [stream.add(i) for i in ids] + [stream.rest()]
    assert "".join(pieces) == TOKENIZER.decode(ids)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop(text, stops):
    watch = Stops(tuple(stops))
    pieces = [watch.add(letter) for letter in text]
    told = "".join(pieces)
    ends = [text.find(stop) for stop in stops if stop in text]
    assert watch.found == bool(ends)
    first = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    if first is None:
        assert told + watch.rest() == text
    else:  # the first that is complete ends it
        assert (
            told + watch.rest()
            == text[
                : min(
                    text.find(stop) for stop in stops if 0 <= text.find(stop) <= first - len(stop)
                )
            ]
        )


def test_stop_texts(alphabet):
    said: list[str] = []
    sampling = ji.Sampling(max_new_tokens=20, stop=("mnx", "kl", "lmn"))
    (found,) = ji.generate(alphabet, "abc", sampling, on_token=lambda _, text: said.append(text))
    assert (found.text, found.reason) == ("defghij", "stop")
    assert "".join(said) == "defghij"
    assert found.ids == tuple(b"defghijkl")
    (found,) = go_on(alphabet, "abc", max_new_tokens=3, stop=("ghi",))
    assert (found.text, found.reason) == ("def", "length")


def test_what_ends_a_text_is_what_the_checkpoint_says(tmp_path):
    (found,) = go_on(write_model(tmp_path / "a", eos_token_id=None), "vwx", max_new_tokens=6)
    assert found.text == "yz{|}~"
    ends = {"eos_token_id": [ord("z"), ord("g")]}
    model = write_model(tmp_path / "b", says=ends)
    found = go_on(model, ["vwx", "bcd"])
    assert [c.text for c in found] == ["y", "ef"]
    assert [c.ids[-1] for c in found] == [ord("z"), ord("g")]


def test_the_context_is_the_limit(alphabet, capsys):
    found = go_on(alphabet, ["a" * 50, "abc"], max_new_tokens=30)
    assert [len(c.ids) for c in found] == [14, 24]
    assert [c.reason for c in found] == ["length", "stop"]
    code, out, err = jqx("generate", alphabet, "--prompt", "a" * 50, "-n", "30")
    assert code == 0
    assert out == "bcdefghijklmno\n"
    assert "prompt 1: 14 new tokens at most, not 30" in err


def test_a_short_prompt_goes_on_for_long_beside_a_long_one(tmp_path):
    """The one fills the context, the other nearly does so after it: both keep all they saw."""
    folder = shutil.copytree(bundled_model(), tmp_path / "endless")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3071}))
    model = ji.load(folder)
    long, short = np.random.default_rng(0).integers(300, 3000, 250).tolist(), [301, 302, 303]
    sampling = ji.Sampling(max_new_tokens=250)
    both = ji.generate(model, [long, short], sampling, compute="float32")
    alone = ji.generate(model, [short], sampling, compute="float32")
    assert [len(c.ids) for c in both] == [6, 250]
    assert both[1].ids == alone[0].ids


def test_how_tokens_are_drawn_by_default():
    says = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    plain = ji.Sampling()
    assert draw_of(plain, {}) == Draw()
    assert draw_of(plain, says | {"do_sample": False}) == Draw()
    assert draw_of(plain, says) == Draw(0.6, 20, 0.9)
    assert draw_of(plain, {"do_sample": True}) == Draw(1.0)
    assert draw_of(ji.Sampling(temperature=0), says) == Draw()
    assert draw_of(ji.Sampling(temperature=0.2, top_k=0, top_p=1), says) == Draw(0.2)
    assert draw_of(ji.Sampling(top_p=0.5), {}) == Draw(1.0, None, 0.5)
    assert draw_of(ji.Sampling(temperature=0.7), {}) == Draw(0.7)


def test_drawn_texts_depend_on_the_seed_and_their_prompt_alone(tmp_path):
    model = ji.load(write_model(tmp_path / "m", initializer_range=0.02))
    hot = {"max_new_tokens": 8, "temperature": 60.0}
    together = go_on(model, ["abc", "hello", "abc"], **hot)
    assert go_on(model, ["hello", "abc"], **hot) == [together[1], together[0]]
    assert together[0].ids != together[2].ids
    assert go_on(model, "abc", **hot, seed=1)[0].ids != together[0].ids
    assert go_on(model, ["abc", "hello", "abc"], **hot) == together


def test_conversations(tmp_path):
    """The template's own brackets are the prompt: what is last in it goes on."""
    model = write_model(tmp_path / "m", followers([b"]stu"]), template=True)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    one = go_on(model, messages)
    assert one == go_on(model, [messages]) == go_on(model, "[user]Hi[assistant]Ho[A]")
    assert one[0].text == "stu"
    assert one[0].prompt_tokens == len("[user]Hi[assistant]Ho[A]")


def test_ids_need_no_tokenizer(tmp_path):
    (write_model(tmp_path / "m") / "tokenizer.json").unlink()
    (found,) = go_on(tmp_path / "m", np.frombuffer(b"abc", np.uint8), max_new_tokens=3)
    assert (found.text, found.ids) == ("", tuple(b"def"))


@pytest.mark.parametrize("options", [("int8_weight_only",), ("nvfp4", "--kv-cache", "fp8")])
def test_quantized_checkpoints_go_on_alike(alphabet, tmp_path, options):
    """From the command line to the text; weights stay as they are stored."""
    np.save(tmp_path / "ids.npy", np.arange(96).reshape(2, 3, 16))
    out = tmp_path / "quantized"
    assert (
        jqx("quantize", alphabet, out, "--qformat", *options, "--calib", tmp_path / "ids.npy").code
        == 0
    )
    prompts = ["abc", "op"]
    assert go_on(out, prompts, max_new_tokens=9) == go_on(alphabet, prompts, max_new_tokens=9)
    params = ji.load(out).params
    assert params["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"].bits < 9
