# SPDX-License-Identifier: Apache-2.0
"""KEY_RULES: what an engine makes of the keys of descriptions, where it knows the formats."""

from collections.abc import Iterator, Mapping

from .engines import Engine
from .intrinsic import Seen
from .problem import WARNING
from .rule import Rule
from .schemes import AWQ, CT, GPTQ, MODELOPT

NEEDED_KEYS: Mapping[tuple[str, str], tuple[tuple[str, ...], ...]] = {
    (AWQ, "vllm"): (("bits", "w_bit"), ("group_size", "q_group_size"), ("zero_point",)),
    (AWQ, "sglang"): (("bits", "w_bit"), ("group_size", "q_group_size"), ("zero_point",)),
    (GPTQ, "vllm"): (("bits",), ("group_size",), ("desc_act",), ("sym",)),
    (GPTQ, "sglang"): (("bits",), ("group_size",), ("desc_act",), ("sym",)),
}
"""(layout, engine) -> keys of quantization_config, one of each."""


def _keys(seen: Seen, engine: Engine) -> Iterator[str]:
    facts = seen.facts
    config = facts.files.config.get("quantization_config")
    given = config if isinstance(config, dict) else {}
    for names in NEEDED_KEYS.get((facts.layout, engine.name), ()):
        if not any(given.get(name) is not None for name in names):
            yield f"quantization_config has no {' or '.join(names)}"


def _description_file(seen: Seen, engine: Engine) -> Iterator[str]:
    facts = seen.facts
    if engine.name == "trtllm" and facts.layout == MODELOPT and facts.files.file is None:
        yield "no hf_quant_config.json, which alone holds group_size and the KV cache for it"


def _capitals(seen: Seen, engine: Engine) -> Iterator[str]:
    config = seen.facts.files.config.get("quantization_config")
    name = config.get("quant_algo") if isinstance(config, dict) else None
    if engine.name != "sglang" or not isinstance(name, str) or name == name.upper():
        return
    if name.upper() in ("FP8", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "MIXED_PRECISION"):
        yield f"quant_algo is {name!r}, and SGLang knows it in capitals alone"


def _reordered(seen: Seen, engine: Engine) -> Iterator[str]:
    """Columns in another order, which vLLM takes no more."""
    found = seen.facts.files.config.get("quantization_config")
    if engine.name != "vllm" or not isinstance(found, dict):
        return
    whole = found.get("group_size") == -1
    if seen.facts.layout == GPTQ and found.get("desc_act") is True and not whole:
        yield "desc_act is true, and vLLM 0.32 takes columns in their order alone"
    groups = found.get("config_groups") if seen.facts.layout == CT else None
    for name, group in groups.items() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        order = weights.get("actorder") if isinstance(weights, dict) else None
        if order is True or order in ("group", "dynamic"):
            yield f"actorder of {name} is {order!r}, and vLLM 0.32 takes weight or static alone"


KEY_RULES: tuple[Rule[Seen], ...] = (
    Rule(
        name="keys",
        check=_keys,
        source="vLLM 0.32 auto_awq.py and auto_gptq.py, SGLang 0.5.23 awq.py and gptq.py",
        way_out="add the key to quantization_config in config.json",
    ),
    Rule(
        name="description-file",
        check=_description_file,
        source="TensorRT-LLM quantization/modelopt_config.py; newer sources read config.json, too "
        "(read, not run)",
        way_out="write the checkpoint again: both descriptions belong to it",
        severity=WARNING,
    ),
    Rule(
        name="capitals",
        check=_capitals,
        source="SGLang 0.5.23 srt/configs/model_config.py",
        way_out="write quant_algo in capitals",
    ),
    Rule(
        name="reordered",
        check=_reordered,
        source="vLLM 0.32 utils/gptq_utils.py, compressed_tensors/compressed_tensors.py",
        way_out="quantize with static activation ordering, or without",
    ),
)
