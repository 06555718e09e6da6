# SPDX-License-Identifier: Apache-2.0
"""Reading one config with one family row: names and defaults resolved, what is missing or not
understood named.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jqx import InputError

from .family import DEFAULTS, REQUIRED, Family
from .neutral import NEUTRAL

MOST_LAYERS = 10_000
"""More are a damaged config; every layer takes memory before its weights are looked for."""


@dataclass(frozen=True)
class Reader:
    """`reader(meaning)` is the value of a config key under the names, defaults and nulls the family
    gives it. What was asked for is remembered in `seen`.
    """

    row: Family
    config: Mapping[str, Any]
    seen: set[str] = field(default_factory=set)

    def __call__(self, meaning: str, default: Any = None) -> Any:
        """The value of `meaning`; an absent key has its default, and so has a null where None means
        nothing. `default`: for meanings of which no table has one.
        """
        present = [key for key in self.keys(meaning) if key in self.config]
        self.seen.update(self.keys(meaning))
        for key in present:
            if self.config[key] is not None:
                return self.config[key]
        if present and meaning in DEFAULTS and DEFAULTS[meaning] is None:
            return None
        value = self.row.defaults.get(meaning, DEFAULTS.get(meaning, default))
        return value(self) if callable(value) else value

    def flag(self, flag: Any) -> bool:
        """A fact of the row, what the config key it names says, or a function of what is read."""
        return bool(self(flag) if isinstance(flag, str) else self.of(flag))

    def of(self, choice: Any) -> Any:
        """A choice of the row, or what a function of what is read chooses."""
        return choice(self) if callable(choice) else choice

    def layers(self, meaning: str, known: tuple[Any, ...]) -> list[Any] | None:
        """The list `meaning`, an entry a layer, each one of `known`; None where there is none.
        Raises InputError for other lists.
        """
        given, layers = self(meaning), self("num_hidden_layers")
        if given is None:
            return None
        if not isinstance(given, list):
            raise InputError(f"{meaning} is {given!r:.60}, not a list")
        unknown = [entry for entry in given if entry not in known]
        if unknown or len(given) != layers:
            found = ", ".join(sorted({repr(entry) for entry in given}))
            raise InputError(
                f"{meaning} has {len(given)} entries for {layers} layers, among them {found:.200}; "
                f"known: {', '.join(map(str, known))}"
            )
        return given

    def check_required(self) -> None:
        """Raise InputError naming every size that is absent or not a positive integer."""
        missing = [meaning for meaning in REQUIRED if self(meaning) is None]
        if missing:
            named = ", ".join(self.keys(meaning)[0] for meaning in missing)
            raise InputError(f"config of model_type {self.row.model_type!r} lacks {named}")
        sizes = (*REQUIRED, "num_key_value_heads", "head_dim")
        wrong = {m: self(m) for m in sizes if self(m) is not None and not _positive(self(m))}
        if wrong:
            named = ", ".join(f"{self.keys(m)[0]} = {value!r}" for m, value in wrong.items())
            raise InputError(f"config needs positive integers, but has {named}")
        if self("num_hidden_layers") > MOST_LAYERS:
            raise InputError(
                f"config has num_hidden_layers {self('num_hidden_layers')}; "
                f"no model has more than {MOST_LAYERS}"
            )

    def refuse_unread(self) -> None:
        """Raise InputError for options that change the arithmetic of some family and that were not
        asked for.
        """
        for key, neutral in NEUTRAL.items():
            value = self.config.get(key)
            if key in self.seen or value in neutral or _all_full(value):
                continue
            raise InputError(
                f"config sets {key} = {_short(value)}, which is not supported for model_type "
                f"{self.row.model_type!r}; supported: {_short(neutral[-1])}"
            )

    def keys(self, meaning: str) -> tuple[str, ...]:
        """The config keys that carry a meaning."""
        return self.row.keys.get(meaning, (meaning,))


def _all_full(value: Any) -> bool:
    return isinstance(value, list) and set(map(str, value)) <= {"full_attention"}


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
