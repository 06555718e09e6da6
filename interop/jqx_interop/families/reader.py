# SPDX-License-Identifier: Apache-2.0
"""Reading one config with one family row: names and defaults resolved, what is missing or not
understood named.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jqx import InputError

from .family import DEFAULTS, NEUTRAL, REQUIRED, Family, Flag

MOST_LAYERS = 10_000
"""More are a damaged config; every layer takes memory before its weights are looked for."""


@dataclass(frozen=True)
class Reader:
    """`reader(meaning)` is the value of a config key under the names, defaults and nulls the family
    gives it.
    """

    row: Family
    config: Mapping[str, Any]

    def __call__(self, meaning: str) -> Any:
        """The value of `meaning`; an absent key has its default, and so has a null where None means
        nothing.
        """
        present = [key for key in self._keys(meaning) if key in self.config]
        for key in present:
            if self.config[key] is not None:
                return self.config[key]
        if present and meaning in DEFAULTS and DEFAULTS[meaning] is None:
            return None
        return self.row.defaults.get(meaning, DEFAULTS.get(meaning))

    def flag(self, flag: Flag) -> bool:
        """A fact of the row, or what the config key it names says."""
        return flag if isinstance(flag, bool) else bool(self(flag))

    def check_required(self) -> None:
        """Raise InputError naming every size that is absent or not a positive integer."""
        missing = [meaning for meaning in REQUIRED if self(meaning) is None]
        if missing:
            raise InputError(
                f"config of model_type {self.row.model_type!r} lacks {', '.join(missing)}"
            )
        sizes = (*REQUIRED, "num_key_value_heads", "head_dim")
        wrong = {m: self(m) for m in sizes if self(m) is not None and not _positive(self(m))}
        if wrong:
            named = ", ".join(f"{meaning} = {value!r}" for meaning, value in wrong.items())
            raise InputError(f"config needs positive integers, but has {named}")
        if self("num_hidden_layers") > MOST_LAYERS:
            raise InputError(
                f"config has num_hidden_layers {self('num_hidden_layers')}; "
                f"no model has more than {MOST_LAYERS}"
            )

    def refuse_unread(self, read: tuple[str, ...]) -> None:
        """Raise InputError for options that change the arithmetic of some family and that this one
        does not read.
        """
        known = {key for meaning in (*REQUIRED, *read) for key in self._keys(meaning)}
        for key, neutral in NEUTRAL.items():
            value = self.config.get(key)
            if key in known or value in neutral or _all_full(value):
                continue
            raise InputError(
                f"config sets {key} = {_short(value)}, which is not supported for model_type "
                f"{self.row.model_type!r}; supported: {_short(neutral[-1])}"
            )

    def _keys(self, meaning: str) -> tuple[str, ...]:
        return self.row.keys.get(meaning, (meaning,))


def _all_full(value: Any) -> bool:
    return isinstance(value, list) and set(value) <= {"full_attention"}


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
