# SPDX-License-Identifier: Apache-2.0
"""INTRINSIC: what makes a checkpoint faulty whoever reads it.

Rules on files and descriptions hand on what was met in reading them; those on tensors compare them
with what the descriptions promise.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from . import kv_checks
from .description_checks import dtype, excluded, ignores_nothing, lists, unlisted, unmatched
from .expert_checks import left_out, missing, unlike
from .facts import Facts
from .numbers import Numbers
from .problem import WARNING
from .rule import Finding, Rule
from .tensor_rules import TENSOR_RULES

QUANTIZE = "write the checkpoint again from the original"
COPY = "copy the file again, or write the checkpoint again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What intrinsic rules look at."""

    facts: Facts
    numbers: Numbers


def _met(rule: str) -> Callable[[Seen, Any], Iterable[str]]:
    """What was met under the name of `rule` when files and descriptions were read."""

    def check(seen: Seen, engine: object) -> Iterator[str]:
        facts = seen.facts
        met = (*facts.files.problems, *facts.said.problems, *facts.known.problems)
        for name, text in met:
            if name == rule:
                yield text

    return check


def _on_facts(check: Callable[[Facts], Iterable[str | Finding]]) -> Callable[[Seen, Any], Any]:
    return lambda seen, engine: check(seen.facts)


def _bad(seen: Seen, engine: object) -> Iterable[str]:
    return seen.numbers.bad


def _odd(seen: Seen, engine: object) -> Iterable[str]:
    return seen.numbers.odd


def _matrix(seen: Seen, engine: object) -> Iterator[str]:
    """Stored shapes that are not those of the codes."""
    for name, shape in seen.numbers.matrices.items():
        linear = seen.facts.linears.get(name.rpartition(".")[0])
        if linear is None or linear.dims is None:
            continue
        n, k, _ = linear.dims
        # codes end with the last whole word, so without a configuration k may be a little less
        known = linear.path in seen.facts.shapes
        fits = len(shape) == 2 and shape[0] == n and (shape[1] == k or (not known and shape[1] < k))
        if not fits or k - shape[1] >= 8:
            yield f"{name} says {list(shape)}, and the codes are of [{n}, {k}]"


def _orders(seen: Seen, engine: object) -> Iterator[str]:
    """Groups of columns that have no scales; -1 everywhere says that there is no order."""
    for name, (low, high) in seen.numbers.orders.items():
        linear = seen.facts.linears.get(name.rpartition(".")[0])
        if linear is None or linear.dims is None or (low, high) == (-1, -1):
            continue
        groups = -(-linear.dims.k // linear.dims.g)
        if low < 0 or high >= groups:
            yield f"{name} goes from {low} to {high}, and there are {groups} groups"


def _agree(seen: Seen, engine: object) -> Iterator[str | Finding]:
    yield from _met("descriptions-agree")(seen, engine)
    yield from lists(seen.facts)


INTRINSIC: tuple[Rule[Seen], ...] = (
    Rule(
        name="config",
        check=_met("config"),
        source="every engine reads it",
        way_out=COPY,
        given=True,  # values are the source's
    ),
    Rule(
        name="model-type",
        check=_met("model-type"),
        source="jqx families",
        way_out="compare the tensors' names with those of the original",
        severity=WARNING,
    ),
    Rule(name="shard", check=_met("shard"), source="the safetensors format", way_out=COPY),
    Rule(
        name="index",
        check=_met("index"),
        source="vLLM 0.32 model_loader/weight_utils.py filter_duplicate_safetensors_files",
        way_out="write the index anew, or remove it where one file holds everything",
    ),
    Rule(
        name="duplicate",
        check=_met("duplicate"),
        source="vLLM 0.32 model_loader/weight_utils.py: it reads both, and the last stays",
        way_out="remove it from the file that the index does not name",
        stops=False,
    ),
    Rule(
        name="index-extra",
        check=_met("index-extra"),
        source="vLLM 0.32 model_loader/weight_utils.py filter_duplicate_safetensors_files",
        way_out="remove the file, or the index that does not belong to it",
        severity=WARNING,
    ),
    Rule(
        name="stray-file",
        check=_met("stray-file"),
        source="vLLM 0.32 and SGLang 0.5.23 read every safetensors file where there is no index",
        way_out="remove the file",
        spares=frozenset(("transformers",)),
    ),
    Rule(
        name="same-file",
        check=_met("same-file"),
        source="vLLM 0.32 and SGLang 0.5.23 read every safetensors file where there is no index",
        way_out="remove the file",
        severity=WARNING,
    ),
    Rule(
        name="index-size",
        check=_met("index-size"),
        source="the index's own metadata",
        way_out="write the index anew",
        stops=False,
    ),
    Rule(
        name="tokenizer",
        check=_met("tokenizer"),
        source="vLLM 0.32: without one it serves token ids alone, with --skip-tokenizer-init",
        way_out="copy the tokenizer's files from the original model",
        stops=False,
        given=True,
    ),
    Rule(
        name="description",
        check=_met("description"),
        source="what ModelOpt 0.47, compressed-tensors, AutoAWQ and GPTQ write",
        way_out=QUANTIZE,
    ),
    Rule(
        name="format",
        check=_met("format"),
        source="vLLM 0.32 compressed_tensors/compressed_tensors.py goes by it",
        way_out="write the format of the tensors in quantization_config",
    ),
    Rule(
        name="format-name",
        check=_met("format-name"),
        source="vLLM 0.32 compressed_tensors/compressed_tensors.py: that of a group comes first",
        way_out="write the format of the groups in its place",
        stops=False,
    ),
    Rule(
        name="descriptions-agree",
        check=_agree,
        source="vLLM and SGLang read config.json, TensorRT-LLM hf_quant_config.json",
        way_out="keep the two that were written together",
    ),
    Rule(
        name="model-dtype",
        check=_on_facts(dtype),
        source="vLLM 0.32 and transformers 5.19 compute in that dtype",
        way_out="set dtype in config.json to that of the weights",
        given=True,
    ),
    Rule(
        name="excluded",
        check=_on_facts(excluded),
        source="engines make a plain linear of it, which has no place for codes",
        way_out="take it off the list of what is left alone, or write it unquantized",
    ),
    Rule(
        name="unlisted",
        check=_on_facts(unlisted),
        source="engines make a quantized linear of it, and find no scales",
        way_out="list it among what is left alone, or quantize it",
    ),
    Rule(
        name="experts",
        check=_on_facts(left_out),
        source="engines make one matrix of all experts of a layer",
        way_out="quantize all experts of a layer alike, or list all of them",
        given=True,
    ),
    Rule(
        name="missing-expert",
        check=_on_facts(missing),
        source="vLLM 0.32 loads what there is without a word",
        way_out=QUANTIZE,
        given=True,
    ),
    Rule(
        name="unlike-experts",
        check=_on_facts(unlike),
        source="engines make one matrix of all experts of a layer",
        way_out=QUANTIZE,
        given=True,
    ),
    Rule(
        name="described",
        check=_on_facts(unmatched),
        source="quantized_layers, and targets of config_groups: engines do not look for it",
        way_out=QUANTIZE,
        stops=False,
    ),
    Rule(
        name="ignored-module",
        check=_on_facts(ignores_nothing),
        source="exclude_modules and ignore name modules of the model",
        way_out="check the name for misprints",
        severity=WARNING,
    ),
    Rule(
        name="kv-pair",
        check=_on_facts(kv_checks.pairs),
        source="TensorRT-LLM: k_scale and v_scale come together (read, not run)",
        way_out=QUANTIZE,
    ),
    Rule(
        name="kv-place",
        check=_on_facts(kv_checks.places),
        source="vLLM 0.32: there is no attention in what it makes of other linears",
        way_out=QUANTIZE,
    ),
    Rule(
        name="kv-shape",
        check=_on_facts(kv_checks.shapes),
        source="vLLM 0.32 loads one number into a scale of keys and values",
        way_out=QUANTIZE,
    ),
    Rule(
        name="kv-layers",
        check=_on_facts(kv_checks.layers),
        source="vLLM 0.32: a layer without a scale has 1",
        way_out=QUANTIZE,
        severity=WARNING,
    ),
    Rule(
        name="kv-described",
        check=_on_facts(kv_checks.described),
        source="kv_cache_scheme and kv_cache_quant_algo",
        way_out="name the format of keys and values in the descriptions",
        severity=WARNING,
    ),
    Rule(
        name="scale-numbers",
        check=_bad,
        source="a scale is a positive finite number",
        way_out=QUANTIZE,
    ),
    Rule(
        name="scale-magnitude",
        check=_odd,
        source="scales of trained models lie between 1e-12 and 1e6",
        way_out="compare the weights with the original's",
        severity=WARNING,
    ),
    Rule(
        name="matrix-shape",
        check=_matrix,
        source="compressed-tensors: weight_shape is the shape of the matrix",
        way_out=QUANTIZE,
    ),
    Rule(
        name="group-index",
        check=_orders,
        source="GPTQ: g_idx says which scale a column has; vLLM 0.32 does not read it",
        way_out=QUANTIZE,
        stops=False,
    ),
    *(
        Rule(
            name=rule.name,
            check=_on_facts(rule.check),
            source=rule.source,
            way_out=QUANTIZE,
            spares=rule.spares,
            given=rule.given,
        )
        for rule in TENSOR_RULES
    ),
)
