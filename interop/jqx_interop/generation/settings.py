# SPDX-License-Identifier: Apache-2.0
"""How a text goes on: what the caller asks for, and what the checkpoint says where he does not."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jqx.errors import InputError
from jqx.models.sampling import Draw
from jqx_interop.checkpoints import one_line, read_beside

MOST_KEPT = 1 << 24  # more tokens than any vocabulary has
GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen, and when to stop.

    At most `max_new_tokens`, fewer where the model's context ends. `temperature` 0 takes the
    likeliest token; above it tokens are drawn, from the `top_k` likeliest (0: from all) and of
    those from the fewest whose probability reaches `top_p`. What is None is as the checkpoint's
    generation_config.json says if that sets do_sample; otherwise nothing is drawn unless `top_k` or
    `top_p` is given. The same `seed` and prompt draw the same tokens, whatever else is in the
    batch. A text ends before any of the texts in `stop`.
    """

    max_new_tokens: int = 128
    temperature: float | int | None = None
    top_k: int | None = None
    top_p: float | int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise InputError for a value that means nothing."""
        for name, right, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", _finite(self.temperature, 0.0), "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 0, "0 or more; 0 keeps all tokens"),
            ("top_p", _finite(self.top_p, 1e-9) and (self.top_p or 0) <= 1, "above 0, 1 at most"),
            ("seed", 0 <= self.seed < 1 << 32, "from 0 to 4294967295"),
        ):
            if not right:
                raise InputError(f"{name} is {getattr(self, name)}; it is {wanted}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise InputError(f"stop is {self.stop!r}; it is a tuple of texts, none of them empty")


def _finite(value: float | int | None, least: float) -> bool:
    return value is None or (math.isfinite(value) and value >= least)


def read_generation_config(path: Path | None) -> dict[str, Any]:
    """generation_config.json in the directory `path`; empty where there is none.

    Raises InputError if it is not a JSON object.
    """
    return {} if path is None else read_beside(path, GENERATION_CONFIG) or {}


def draw_of(sampling: Sampling, said: Mapping[str, Any]) -> Draw:
    """The steps of drawing a token; `said` is generation_config.json.

    Raises InputError for a value there that means nothing.
    """
    drawn = said.get("do_sample") is True
    asked = sampling.top_k is not None or sampling.top_p is not None
    names = [n for n in ("temperature", "top_k", "top_p") if getattr(sampling, n) is None]
    unsaid = {name: said[name] for name in names if drawn and said.get(name) is not None}
    for name, value in unsaid.items():
        if not isinstance(value, int if name == "top_k" else int | float):
            raise InputError(one_line(f"{GENERATION_CONFIG}: {name} is {value!r}, no number"))
    wanted = replace(sampling, **unsaid)
    try:
        wanted.check()
    except InputError as error:
        raise InputError(f"{GENERATION_CONFIG}: {error}") from error
    temperature = wanted.temperature
    if temperature is None:
        temperature = 1.0 if drawn or asked else 0.0
    if temperature == 0:
        return Draw()
    return Draw(
        temperature=float(temperature),
        top_k=min(wanted.top_k, MOST_KEPT) if wanted.top_k else None,
        top_p=None if wanted.top_p in (None, 1) else float(wanted.top_p or 0),
    )


def ends_of(said: Mapping[str, Any], config: Mapping[str, Any]) -> frozenset[int]:
    """The ids that end a text: eos_token_id of generation_config.json, else of config.json.

    Raises InputError if that is no id and no list of ids.
    """
    for where, values in ((GENERATION_CONFIG, said), ("config.json", config)):
        found = values.get("eos_token_id")
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise InputError(one_line(f"{where}: eos_token_id is {found!r}, no token id"))
        return frozenset(ids)
    return frozenset()
