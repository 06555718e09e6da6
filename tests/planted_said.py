# SPDX-License-Identifier: Apache-2.0
"""Faults to plant in good checkpoints: where descriptions disagree, and what those of
compressed-tensors, AutoAWQ and GPTQ can get wrong.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from checkpoints import write
from damage import add, arrays, change
from planted import DOWN, UP, Fault, bf16
from served import INDEX, inline, saying


def twice(folder: Path) -> None:
    """The first file has a tensor of the second, too."""
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    first, second = sorted(set(where.values()))[:2]
    names = [name for name, file in where.items() if file == first]
    names.append(next(name for name, file in where.items() if file == second))
    every = arrays(folder)
    write(folder / "other", {name: every[name] for name in names})
    shutil.move(folder / "other" / "model.safetensors", folder / first)
    (folder / "other").rmdir()


def left_out(folder: Path, path: str = UP, shape: tuple[int, int] = (128, 64)) -> None:
    """A linear of an AWQ checkpoint that is not quantized."""
    for leaf in ("qweight", "qzeros", "scales"):
        change(f"{path}.{leaf}", None)(folder)
    add(f"{path}.weight", np.ones(shape, np.float16))(folder)


def grouped(**changes: object):
    """Change keys of the config group."""
    return lambda folder: inline(folder, lambda q: q["config_groups"]["group_0"].update(changes))


def weighing(**changes: object):
    """Change arguments of weights."""
    return lambda folder: inline(
        folder, lambda q: q["config_groups"]["group_0"]["weights"].update(changes)
    )


SAID_FAULTS = {
    "the two lists disagree about a linear": Fault(
        "nvfp4",
        lambda f: [bf16(DOWN)(f), saying(ignore=["lm_head", DOWN])(f)],
        "descriptions-agree",
        DOWN,
    ),
    "the two mixtures disagree": Fault(
        "mixed",
        lambda f: inline(f, lambda q: q["quantized_layers"].pop(DOWN)),
        "descriptions-agree",
        f"do not store alike: {DOWN}",
    ),
    "a tensor in two files": Fault("sharded", twice, "duplicate", "model-00001-of-"),
    # compressed-tensors
    "no format": Fault(
        "ct-int4", lambda f: (saying(format=None)(f), grouped(format=None)(f)), "format", "None"
    ),
    "another format": Fault(
        "ct-int4", grouped(format="float-quantized"), "format", "W4A16 is pack-quantized"
    ),
    "a format that is none": Fault("ct-int4", saying(format="foo"), "format-name", "'foo'"),
    "an order that is none": Fault("ct-int4", weighing(actorder="foo"), "description", "'foo'"),
    "columns in another order": Fault(
        "ct-int4", weighing(actorder="group"), "reordered", "'group'", "vllm"
    ),
    "an ignored pattern that is none": Fault(
        "ct-int4", saying(ignore=["lm_head", "re:(["]), "description", "no regular expression"
    ),
    "a target that is none": Fault(
        "ct-int4", grouped(targets=["re:([", "Linear"]), "description", "no regular expression"
    ),
    "a target that is no linear": Fault(
        "ct-int4", grouped(targets=["Linear", f"{UP}s"]), "described", f"{UP}s"
    ),
    # AutoAWQ and GPTQ
    "AWQ left out": Fault(
        "awq",
        lambda f: [left_out(f), saying(modules_to_not_convert=["visual"])(f)],
        "unlisted",
        UP,
    ),
    "AWQ left out without a list": Fault("awq", left_out, "no-list", UP, "sglang"),
    "AWQ whose head is said to be quantized": Fault(
        "awq", saying(lm_head=True, modules_to_not_convert=["x"]), "unlisted", "lm_head"
    ),
    "GPTQ without bits": Fault("gptq", saying(bits=None), "description", "has no bits"),
    "GPTQ left alone and quantized": Fault(
        "gptq", saying(dynamic={"-:.*1.mlp.up_proj": {}}), "excluded", UP
    ),
    "GPTQ of other bits": Fault(
        "gptq", saying(dynamic={"+:.*1.mlp.up_proj": {"bits": 8}}), "shape", f"{UP}.qzeros"
    ),
    "GPTQ with a pattern that is none": Fault(
        "gptq", saying(dynamic={"-:([": {}}), "description", "no regular expression"
    ),
    "GPTQ in another order": Fault("gptq", saying(desc_act=True), "reordered", "desc_act", "vllm"),
}
