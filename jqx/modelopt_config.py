# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's dictionaries as configurations: what its quantizers end up as, as rules.

    {"quant_cfg": [{"quantizer_name": "*", "enable": False},
                   {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (4, 3)}}],
     "algorithm": "max"}

Entries apply in order, the last one wins. One with `cfg` replaces all attributes, one with `enable`
alone turns quantizers off and on again as they were. Before the first entry everything is INT8:
weights a scale per output channel, tables one per tensor, inputs per tensor. Outputs, and keys and
values, which no cache here stores as INT8, stay as they are until an entry says otherwise. What
ModelOpt rounds only where it simulates attention (queries, probabilities) has no effect.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .config import FIELDS, KEEP, ON, QuantConfig, Rule, from_json, only, read_algorithm
from .errors import InputError, nearest
from .globs import without_ending
from .modelopt_formats import Attributes, format_of, read_attributes
from .steps import check_steps

OF_WEIGHTS = {
    "weight": ".weight_quantizer",
    "input": ".input_quantizer",
    "output": ".output_quantizer",
}
"""Field of a rule -> how the names of its quantizers end."""
OF_KEYS, OF_VALUES = ".k_bmm_quantizer", ".v_bmm_quantizer"
ENDINGS = (
    *OF_WEIGHTS.values(),
    OF_KEYS,
    OF_VALUES,
    ".q_bmm_quantizer",
    ".p_bmm_quantizer",
    ".softmax_quantizer",
    ".bmm2_output_quantizer",
)
"""How names of quantizers end; the last four have no effect here."""
WORDS = [ending[1:] for ending in ENDINGS]

PARENTS = {"nn.Linear": "linear", "nn.Embedding": "embedding"}
"""Class of a module -> kind of rule."""
NOT_HERE = ("nn.LeakyReLU", "nn.LayerNorm", "nn.RNN", "nn.LSTM", "nn.GRU") + tuple(
    f"nn.{name}{n}d"
    for name in ("BatchNorm", "InstanceNorm", "MaxPool", "AvgPool", "AdaptiveAvgPool")
    for n in (1, 2, 3)
)
"""Classes with quantizers that nothing here corresponds to."""

KEYS = ("quant_cfg", "algorithm", "effective_bits")
ENTRY_KEYS = ("quantizer_name", "parent_class", "cfg", "enable")
IGNORED = (
    "distributed_sync",
    "sync_expert_weight_amax",
    "shared_states",
    "skip_forward_without_activation_calib",
    "max_co_batch_size",
    "max_tokens_per_batch",
    "moe_calib_experts_ratio",
    "debug",
)
"""Parameters of ModelOpt's algorithms that say how to compute, not what."""

FRESH = (
    Rule(weight="int8", input="int8", optional=True),
    Rule(weight="int8_tensor", kind="embedding", optional=True),
)
FRESH_OUTPUTS = (Rule(output="int8", optional=True), Rule(output=None, optional=True))
NO_INPUTS = Rule(input=None, kind="embedding", optional=True)
"""The inputs of lookups are numbers of rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One entry of `quant_cfg`. `stages`: the attributes of quantizers in turn, None to leave them;
    `shown`: the entry for people.
    """

    glob: str
    kind: str | None
    stages: list[Attributes] | None
    enable: bool
    shown: str

    @property
    def clears(self) -> bool:
        """Whether it turns everything off."""
        return self.glob == "*" and self.kind is None and self.stages is None and not self.enable


Part = tuple[tuple[str, ...], list[Any]]
"""Globs, and what a field of their rules becomes one after the other."""


def from_modelopt(data: Mapping[str, Any]) -> QuantConfig:
    """The configuration that a dictionary of ModelOpt stands for, in its list form or the older one
    {"*weight_quantizer": {...}, "default": {...}, "nn.Linear": {...}}.

    Rules may match nothing, as entries may. Methods and parameters of algorithms are not looked up
    (`check_steps`). Raises InputError for unknown keys, with the nearest ones; for attributes that
    are no format here; and for keys and values that differ.
    """
    only(data, KEYS, "key of a ModelOpt configuration")
    if "quant_cfg" not in data:
        raise InputError('a ModelOpt configuration has a "quant_cfg"')
    entries = [_entry(row) for row in _rows(data["quant_cfg"])]
    again = any(entry.enable and entry.stages is None for entry in entries)
    rules = [*FRESH, *(FRESH_OUTPUTS if again else ())]
    for entry in entries:
        if entry.clears and not again:
            rules = []
        else:
            rules += _rules(entry, again)
    _same_keys_and_values(entries, again)
    algorithm = read_algorithm(_algorithm(data.get("algorithm", "max")))
    return QuantConfig(rules=tuple(_telling([*rules, NO_INPUTS])), algorithm=algorithm)


def _telling(rules: Iterable[Rule]) -> Iterable[Rule]:
    """The rules without what they say of fields that have no format yet."""
    given: set[str] = set()
    for rule in rules:
        given |= {field for field in FIELDS if isinstance(getattr(rule, field), str)}
        told = replace(rule, **dict.fromkeys((f for f in FIELDS if f not in given), KEEP))
        if any(getattr(told, field) is not KEEP for field in FIELDS):
            yield told


def read_config(data: Mapping[str, Any]) -> QuantConfig:
    """The configuration in a mapping: of ModelOpt where it has "quant_cfg", else what `to_json`
    writes. Raises InputError for what neither may hold, and for steps that are no algorithms.
    """
    return check_steps(from_modelopt(data) if "quant_cfg" in data else from_json(data))


def update_quant_cfg_with_kv_cache_quant(
    cfg: Mapping[str, Any], kv_entries: Mapping[str, Any] | Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """ModelOpt's dictionary `cfg` with the entries of a KV dictionary after its own."""
    more: Any = kv_entries
    more = more.get("quant_cfg") if isinstance(more, Mapping) else list(more)
    own = cfg.get("quant_cfg") or [{"quantizer_name": "*", "enable": False}]
    entries = [*_rows(own), *_rows(more)]
    return {**cfg, "quant_cfg": entries, "algorithm": cfg.get("algorithm") or "max"}


def _rows(given: Any) -> list[dict[str, Any]]:
    """Entries in the form of today."""
    if isinstance(given, Mapping):
        given = [{key: value} for key, value in given.items()]
    if not isinstance(given, list | tuple) or not all(isinstance(row, Mapping) for row in given):
        raise InputError('quant_cfg is a list of entries {"quantizer_name": ..., "cfg": {...}}')
    return [entry for row in given for entry in _expanded(row)]


def _expanded(row: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    if "quantizer_name" in row:
        yield dict(row)
        return
    if not row or (len(row) > 1 and not any(str(key).startswith("nn.") for key in row)):
        raise InputError(f"an entry of quant_cfg has a quantizer_name, and {dict(row)} has none")
    for key, value in row.items():
        if not str(key).startswith("nn."):
            yield _older(key, value)
        elif isinstance(value, Mapping):
            yield from ({**_older(k, v), "parent_class": key} for k, v in value.items())
        else:
            raise InputError(f"{key}: {value!r} is no mapping of quantizer names")


def _older(key: Any, value: Any) -> dict[str, Any]:
    """An entry from a pair of the older form."""
    cfg, enable = value, {}
    if isinstance(value, Mapping):
        enable = {"enable": value["enable"]} if value.get("enable") is not None else {}
        cfg = {k: v for k, v in value.items() if k != "enable"} or None
    return {"quantizer_name": "*" if key == "default" else key, "cfg": cfg, **enable}


def _entry(row: Mapping[str, Any]) -> Entry:
    only(row, ENTRY_KEYS, "key of an entry of quant_cfg")
    glob, cfg, enable = row["quantizer_name"], row.get("cfg"), row.get("enable", True)
    shown = f"the entry for {glob!r}"
    if not isinstance(glob, str) or not isinstance(enable, bool):
        raise InputError(f"{shown}: quantizer_name is text, enable true or false")
    stages = cfg if isinstance(cfg, list | tuple) else [] if cfg is None else [cfg]
    if not all(isinstance(stage, Mapping) for stage in stages):
        raise InputError(
            f"{shown}: cfg is {cfg!r}; it is a mapping of attributes or a list of them"
        )
    empty = not any(stages)
    if empty and (cfg is not None or "enable" not in row) and enable:
        raise InputError(f"{shown} says nothing: give cfg attributes, or enable alone")
    try:
        return Entry(
            glob=glob,
            kind=_kind(row.get("parent_class")),
            stages=None if empty else [read_attributes(stage) for stage in stages],
            enable=enable,
            shown=shown,
        )
    except InputError as error:
        raise InputError(f"{shown}: {error}") from error


def _kind(parent: Any) -> str | None:
    """The kind of rule for modules of a class; "none" for classes that there are none of."""
    if parent is None or parent in PARENTS:
        return None if parent is None else PARENTS[parent]
    if str(parent).startswith("nn.Conv"):
        raise InputError(f"{parent}: kernels of convolutions are told by their paths, not by class")
    if parent not in NOT_HERE:
        raise nearest(str(parent), (*PARENTS, *NOT_HERE), "parent_class")
    return "none"


def _rules(entry: Entry, again: bool) -> list[Rule]:
    """The rules of an entry: fields with the same globs share them."""
    parts = {field: _part(entry, field, end, again) for field, end in OF_WEIGHTS.items()}
    parts["kv"] = _part(entry, "kv", OF_KEYS, again)
    if not any(without_ending(entry.glob, ending) for ending in ENDINGS):
        raise nearest(entry.glob.rpartition("*")[2], WORDS, f"quantizer in {entry.shown}:")
    together: dict[tuple[int, str, str | None], dict[str, Any]] = {}
    for field, (globs, values) in parts.items():
        kind = "attention" if field == "kv" else entry.kind
        for turn, value in enumerate(values):
            for glob in globs:
                together.setdefault((turn, glob, kind), {})[field] = value
    return [
        Rule(path_glob=glob, kind=kind, optional=True, **said)
        for (_, glob, kind), said in sorted(together.items(), key=lambda item: item[0][0])
    ]


def _part(entry: Entry, field: str, ending: str, again: bool) -> Part:
    """The globs for which an entry sets a field, none if it does not, and what it becomes."""
    if entry.kind == "none" or (field == "kv" and entry.kind is not None):
        return (), []
    exact = without_ending(entry.glob, ending)
    if not exact:
        return (), []
    globs = _globs(entry.glob, exact, "" if field == "kv" else ".weight")
    if entry.stages is None:
        return globs, [ON if entry.enable else None]
    try:
        name = format_of(field, entry.stages)
    except InputError as error:
        if not entry.enable and not again:
            return globs, [None]
        raise InputError(f"{entry.shown}: {error}") from error
    return globs, [name] if entry.enable else [name, None]


def _globs(glob: str, exact: tuple[str, ...], leaf: str) -> tuple[str, ...]:
    """Globs of rules for the modules that `exact` matches: one that reads like `glob` and covers
    just those, else each exactly.
    """
    for candidate in (glob, *exact):
        if candidate.endswith("*") and set(without_ending(candidate, leaf)) == set(exact):
            return (candidate,)
    return tuple(f"={each}" for each in exact)


def _same_keys_and_values(entries: list[Entry], again: bool) -> None:
    """Raises InputError if keys and values become different things."""
    keys, values = (
        [part for entry in entries if (part := _part(entry, "kv", ending, again))[0]]
        for ending in (OF_KEYS, OF_VALUES)
    )
    if keys != values:
        raise InputError(
            "keys and values have one format here: give *k_bmm_quantizer and *v_bmm_quantizer the "
            "same, or *[kv]_bmm_quantizer"
        )


def _algorithm(given: Any) -> Any:
    """ModelOpt's algorithm without what says only how to compute."""
    if isinstance(given, list | tuple):
        return [_algorithm(step) for step in given]
    if not isinstance(given, Mapping):
        return given
    kept = {k: v for k, v in given.items() if k not in IGNORED and (v is not None or k == "method")}
    layerwise = kept.pop("layerwise", None)
    if isinstance(layerwise, Mapping) and layerwise.get("get_qdq_activations_from_prev_layer"):
        raise InputError(
            "layerwise: inputs are those of the model before it is quantized; leave "
            "get_qdq_activations_from_prev_layer out"
        )
    if kept.get("method") is None and set(kept) <= {"method"}:
        return None
    return kept
