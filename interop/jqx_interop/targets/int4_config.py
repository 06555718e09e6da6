# SPDX-License-Identifier: Apache-2.0
"""What AutoAWQ and GPTQ say of a checkpoint in `quantization_config`, and what that means here.

One number of bits and one size of blocks holds for all linears; what is not quantized has plain
weights.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jqx.config import Choice
from jqx.errors import InputError

from .ct_schemes import block_of

AWQ, GPTQ = "awq", "gptq"
V2 = "gptq_v2"
BITS = 4
HEADS = ("lm_head", "embed_out", "output", "output_layer")


def awq_config(
    choices: Mapping[str, Choice], unquantized: Iterable[str], kv: str | None
) -> dict[str, Any]:
    """The value of `quantization_config` in config.json for AutoAWQ's layout; arguments as in
    `ct_config.quantization_config`.
    """
    return {
        "bits": BITS,
        "group_size": _block(choices),
        "lm_head": _has_head(choices),
        "modules_to_not_convert": sorted(unquantized),
        "quant_method": AWQ,
        "version": "gemm",
        "zero_point": True,
    }


def gptq_config(
    choices: Mapping[str, Choice],
    unquantized: Iterable[str],
    kv: str | None,
    *,
    version: str = V2,
) -> dict[str, Any]:
    """The same for GPTQ's layout; `version`: its checkpoint_format."""
    skipped = {f"-:^{re.escape(path)}$": {} for path in sorted(unquantized)}
    return {
        "bits": BITS,
        "checkpoint_format": version,
        "desc_act": False,
        "dynamic": skipped,
        "group_size": _block(choices),
        "lm_head": _has_head(choices),
        "quant_method": GPTQ,
        "sym": True,
    }


def _has_head(choices: Mapping[str, Choice]) -> bool:
    """Whether a head is quantized; engines look for none otherwise."""
    return any(path.rpartition(".")[2] in HEADS for path in choices)


def _block(choices: Mapping[str, Choice]) -> int:
    (size,) = {block_of(choice.weight or "") for choice in choices.values()}
    assert size is not None
    return size


def version_of(said: Mapping[str, Any]) -> str:
    """The checkpoint_format of GPTQ that a description means; the first where it says nothing."""
    return str(said.get("checkpoint_format") or GPTQ)


def int4_choices(
    said: Mapping[str, Any],
    linears: Mapping[str, tuple[int, ...]],
    stored: Iterable[str],
) -> dict[str, Choice]:
    """The formats of every linear that has codes, in the order of `linears`, path -> shape;
    `stored`: the names of all tensors.

    Raises InputError for other numbers of bits, other arrangements, and no size of blocks.
    """
    check_said(said)
    size = said.get("group_size", said.get("q_group_size"))
    if type(size) is not int or (size < 1 and size != -1):
        raise InputError(f"its group_size is {size!r}, not a positive whole number or -1")
    have = set(stored)
    found = {}
    for path, (_, k) in linears.items():
        if f"{path}.qweight" in have:
            block = k if size == -1 else size
            found[path] = Choice(weight="int4" if block == block_of("int4") else f"int4_b{block}")
            if said.get("desc_act") and size != -1 and f"{path}.g_idx" not in have:
                raise InputError(
                    f"its columns are in another order (desc_act), and {path} has no g_idx"
                )
    if not found:
        raise InputError(
            "its description says INT4, and no linear has a qweight: take the description out of "
            "config.json, or give the checkpoint that it is of"
        )
    return found


def check_said(said: Mapping[str, Any]) -> None:
    """Raise InputError for other numbers of bits and other arrangements."""
    bits = said.get("bits", said.get("w_bit"))
    if bits != BITS:
        raise InputError(f"its codes have {bits!r} bits, and only {BITS} are read in this layout")
    version = str(said.get("version") or "gemm").lower()
    if version != "gemm" and said.get("quant_method") != GPTQ:
        raise InputError(f"its codes are arranged for {version}, and only gemm is read")
    if said.get("quant_method") == GPTQ and version_of(said) not in (GPTQ, V2):
        raise InputError(
            f"its checkpoint_format is {version_of(said)}, and only {GPTQ} and {V2} are read"
        )
    own = said.get("dynamic") or {}
    if not isinstance(own, Mapping) or any(not str(key).startswith("-:") for key in own):
        raise InputError("some of its linears have a description of their own (dynamic), not read")
