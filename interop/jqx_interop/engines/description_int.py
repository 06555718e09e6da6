# SPDX-License-Identifier: Apache-2.0
"""How AutoAWQ and GPTQ's packages describe a checkpoint."""

from typing import Any

from .reading import Group, Reader, size_of


def awq(here: Reader, there: Reader) -> dict[str, Any]:
    """AutoAWQ: what its list names by part is left alone, and a head unless it is said to be
    quantized. Without a list vLLM goes by the tensors.
    """
    bits, version = here.get("bits", int, "whole number"), here.said.get("version", "gemm")
    if str(version).lower() != "gemm":
        here.problems.append(("description", f"version {version!r:.30} of AutoAWQ is not gemm"))
    scheme = f"W{bits if bits is not None else here.said.get('w_bit', 4)}A16"
    group = Group(targets=("Linear",), scheme=scheme, size=size_of(here))
    names = here.names("modules_to_not_convert")
    head = () if here.said.get("lm_head") is True else ("lm_head",)
    return {"groups": (group,), "ignored": (*names, *head), "by_tensors": not names}


def gptq(here: Reader, there: Reader) -> dict[str, Any]:
    """GPTQ: engines go by the tensors, and by `dynamic`: regular expressions of what is left alone
    ("-:") or is stored otherwise.
    """
    bits = here.get("bits", int, "whole number")
    if bits is None:
        here.problems.append(("description", f"{here.where} has no bits"))
    base = {"bits": bits, "sym": here.said.get("sym")}
    groups, ignored = [], []
    dynamic = here.inside("dynamic")
    for pattern in map(str, dynamic.said):
        regex = pattern.removeprefix("+:").removeprefix("-:")
        dynamic.patterns([regex])
        if pattern.startswith("-:"):
            ignored.append(f"re:{regex}")
            continue
        other = dynamic.inside(pattern)
        told = {key: value for key, value in other.said.items() if key in base}
        size = size_of(other) or size_of(here)
        groups.append(Group(targets=(f"re:{regex}",), scheme=_scheme(base | told), size=size))
    if bits is not None:
        groups.append(Group(targets=("Linear",), scheme=_scheme(base), size=size_of(here)))
    return {"groups": tuple(groups), "ignored": tuple(ignored), "by_tensors": True}


def _scheme(said: dict[str, Any]) -> str:
    return f"W{said['bits']!s:.9}A16" + ("_ASYM" if said["sym"] is False else "")
