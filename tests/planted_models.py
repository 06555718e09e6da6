# SPDX-License-Identifier: Apache-2.0
"""Faults to plant in good checkpoints: names and shapes that are not those of the configuration,
the configuration itself, experts, scales, files that do not belong there, and schemes of no name.
"""

from pathlib import Path

import numpy as np
from checkpoints import write
from damage import add, arrays, change
from planted import EXPERT, UP, Fault, K, Q, scalar
from served import BF16, F8, HF_QUANT, INDEX, change_all, configured, ignoring, said, saying


def copied(path: str, to: str):
    """The tensors of a module once more under another name."""

    def damage(folder: Path) -> None:
        found = arrays(folder)
        more = {to + n.removeprefix(path): a for n, a in found.items() if n.startswith(f"{path}.")}
        write(folder, found | more)

    return damage


def renamed(before: str, after: str):
    """A tensor under another name."""

    def damage(folder: Path) -> None:
        found = arrays(folder)
        write(folder, found | {after: found.pop(before)})

    return damage


def beside(**tensors: np.ndarray):
    """A second file of tensors, without an index."""

    def damage(folder: Path) -> None:
        write(folder / "other", {name.replace("__", "."): a for name, a in tensors.items()})
        (folder / "other" / "model.safetensors").rename(folder / "old.safetensors")
        (folder / "other").rmdir()

    return damage


def twin(folder: Path) -> None:
    (folder / "old.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


def smaller(folder: Path) -> None:
    """An expert of another size."""
    path = f"{EXPERT}.weight"
    write(folder, arrays(folder) | {path: np.ones((32, 64), F8)})


GONE = EXPERT.replace(".up_proj", "")
V = K.replace("k_proj", "v_proj")
MODEL_FAULTS = {
    # models whose names and shapes are known
    "an expert that is missing": Fault(
        "qwen-moe", change_all(f"{GONE}.", lambda a: None), "missing-tensor", f"{EXPERT}.weight"
    ),
    "an attention that is missing": Fault(
        "qwen-moe", change_all(f"{Q}.", lambda a: None), "missing-tensor", f"{Q}.weight"
    ),
    "a norm of another size": Fault(
        "qwen-moe",
        change("model.norm.weight", lambda a: a[:7].copy()),
        "shape",
        "model.norm.weight has shape [7]",
    ),
    "an expert of another size": Fault("qwen-moe", smaller, "shape", f"{EXPERT}.weight"),
    "a layer too many": Fault(
        "qwen-moe", copied("model.layers.1", "model.layers.2"), "unknown-tensor", "layers.2.self_a"
    ),
    "a linear too many": Fault(
        "nvfp4", copied(UP, f"{UP[:-7]}foo_proj"), "unknown-tensor", f"{UP[:-7]}foo_proj.weight"
    ),
    "a linear of a layer too many": Fault(
        "nvfp4", copied(UP, UP.replace(".1.", ".5.")), "unknown-tensor", "model.layers.5.mlp"
    ),
    "a plain linear too many": Fault(
        "nvfp4",
        lambda f: (
            add("lm_head2.weight", np.ones((4, 4), BF16))(f),
            ignoring("lm_head", "model.embed_tokens", "lm_head2")(f),
        ),
        "unknown-tensor",
        "lm_head2.weight",
    ),
    "a bias that is none": Fault(
        "nvfp4", add(f"{Q}.bias", np.ones(64, BF16)), "unknown-tensor", f"{Q}.bias"
    ),
    # the configuration
    "no model_type": Fault("nvfp4", configured(model_type=None), "config", "model_type None"),
    "layers in words": Fault(
        "nvfp4", configured(num_hidden_layers="two"), "config", "num_hidden_layers 'two'"
    ),
    "no layers": Fault(
        "nvfp4", configured(num_hidden_layers=None), "config", "num_hidden_layers None"
    ),
    "no hidden size": Fault("qwen-moe", configured(hidden_size=0), "config", "hidden_size 0"),
    "an architecture that is not here": Fault(
        "nvfp4", configured(model_type="foo"), "model-type", "'foo' is not defined", "warnings"
    ),
    "a feature that is not here": Fault(
        "nvfp4", configured(logit_scale=0.5), "model-type", "logit_scale", "warnings"
    ),
    # experts of models that are not known
    "an expert that others have": Fault(
        "moe", change_all(f"{GONE}.", lambda a: None), "missing-expert", f"{GONE} is missing"
    ),
    "the last expert of a layer": Fault(
        "moe",
        change_all("layers.1.mlp.experts.3.", lambda a: None),
        "missing-expert",
        "model.layers.1.mlp.experts.3 is missing (1 of 4",
    ),
    "fewer experts than are said": Fault(
        "moe", configured(num_experts=5), "missing-expert", "model.layers.0.mlp.experts.4"
    ),
    "a linear of an expert": Fault(
        "moe", change_all(f"{EXPERT}.", lambda a: None), "missing-expert", f"{EXPERT} is missing"
    ),
    "an expert unlike others": Fault("moe", smaller, "unlike-experts", f"{EXPERT} is of [32, 64]"),
    # keys and values
    "a scale of keys of several numbers": Fault(
        "fp8", change(f"{K}.k_scale", lambda a: np.ones(7, np.float32)), "kv-shape", "[7]"
    ),
    "a scale of keys on queries": Fault(
        "fp8", renamed(f"{K}.k_scale", f"{Q}.k_scale"), "kv-place", f"{Q}.k_scale"
    ),
    "a layer without scales of keys": Fault(
        "fp8",
        lambda f: (change(f"{K}.k_scale", None)(f), change(f"{V}.v_scale", None)(f)),
        "kv-layers",
        "k_scale is in 1 of 2 layers",
        "warnings",
    ),
    # numbers
    "powers of two of zero bytes": Fault(
        "mxfp8", change(f"{UP}.weight_scale", scalar(0)), "scale-numbers", "all are zero bytes"
    ),
    "most block scales zero": Fault(
        "nvfp4",
        change(f"{UP}.weight_scale", lambda a: np.where(np.arange(len(a))[:, None] < 9, a, 0 * a)),
        "scale-magnitude",
        "of 2048 are zero",
        "warnings",
    ),
    "divisors that are factors": Fault(
        "ct-nvfp4",
        change_all("weight_global_scale", lambda a: 1 / a),
        "scale-magnitude",
        "they look inverted",
        "warnings",
    ),
    "a factor that is a divisor": Fault(
        "nvfp4", change(f"{UP}.weight_scale_2", lambda a: 1 / a), "scale-magnitude", UP, "warnings"
    ),
    "groups of columns that there are not": Fault(
        "gptq", change(f"{UP}.g_idx", scalar(99)), "group-index", "there are 2 groups"
    ),
    # schemes of no name
    "an algorithm that is none": Fault("nvfp4", said(quant_algo="FOO"), "accepts", "FOO", "vllm"),
    "an algorithm that is none to SGLang": Fault(
        "nvfp4", said(quant_algo="FOO"), "accepts", "FOO", "sglang"
    ),
    "GPTQ of 3 bits": Fault("gptq", saying(bits=3), "accepts", "4 and 8 bits alone", "vllm"),
    "AWQ of 8 bits": Fault("awq", saying(bits=8), "accepts", "4 bits alone", "vllm"),
    "GPTQ of whole rows": Fault(
        "gptq", saying(group_size=-1), "group-size", "the descriptions say one for whole rows"
    ),
    # files
    "an empty tokenizer": Fault(
        "nvfp4", lambda f: (f / "tokenizer.json").write_text(""), "tokenizer", "is empty"
    ),
    "a tokenizer that was cut": Fault(
        "nvfp4", lambda f: (f / "tokenizer.json").write_text('{"a'), "tokenizer", "is not JSON"
    ),
    "a directory for a file": Fault(
        "nvfp4",
        lambda f: ((f / HF_QUANT).unlink(), (f / HF_QUANT).mkdir()),
        "description",
        f"{HF_QUANT} cannot be read: Is a directory",
    ),
    "a file of something else": Fault(
        "nvfp4", beside(stray__weight=np.ones((4, 4), BF16)), "stray-file", "has stray.weight"
    ),
    "a file of the same": Fault("nvfp4", twin, "same-file", "old.safetensors", "warnings"),
    "an index of nothing": Fault(
        "nvfp4",
        lambda f: (f / INDEX).write_text('{"metadata": {}, "weight_map": {}}'),
        "index",
        "empty weight_map",
    ),
}
