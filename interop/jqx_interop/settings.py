# SPDX-License-Identifier: Apache-2.0
"""How a run is made: everything a caller may choose besides the model, the destination and the
recipe.
"""

from dataclasses import dataclass
from pathlib import Path

from jqx.errors import InputError, nearest

from .checkpoints import one_line, parse_size
from .device import COMPUTE_NAMES

LEAST = {"calib_size": 1, "calib_seq": 1, "batch_size": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Choices of one run. Sizes are bytes or text such as "4GiB" or "10GB".

    `kv_cache`: the format of keys and values, "none" to leave them (None: what the recipe says);
    `calib`: calibration data (None: the bundled text); `activations`: a file of recorded inputs of
    linears, used instead of running the model, which is run only for experts that were not
    recorded, where `calib` is given; `stats`: a directory of statistics that were collected before
    (`jqx calibrate`), likewise; `calib_size` sequences of `calib_seq` tokens, or of as many as the
    model was made for if that is less;
    `batch_size` sequences at a time (0: chosen); `max_memory`: above it, hidden states live in a
    memory-mapped file; `compute`: "auto", "float32" or "bf16"; `options`: what `--set` changes in
    the recipe; `restart`: throw an unfinished run away; `report`: a new directory for what became
    of every linear. The errors of outputs are measured then, which needs calibration data;
    `low_memory`: blocks are run on weights that are compressed when they are read, which the
    algorithm "max" alone can do; `fold`: factors of inputs go into the weights before, so that no
    engine need apply them (None: where the layout has no place for them); `unify_fp8`: linears that
    read one input share their FP8 scale, as engines that fuse them compute; `keep_source`: linears
    that are quantized in the source, and that the recipe leaves alone, stay as they are there;
    `all_experts`: statistics of experts are those of all tokens, not only of those sent to them;
    `fuse_experts`: experts that lie in one tensor stay in one where the layout has them so, instead
    of each having tensors of its own; `expert_coverage`: the least share of the weights of experts
    that must be quantized.
    """

    kv_cache: str | None = None
    calib: str | Path | None = None
    activations: str | Path | None = None
    stats: str | Path | None = None
    calib_size: int = 512
    calib_seq: int = 512
    batch_size: int = 0
    max_memory: int | str = "4GiB"
    max_shard_size: int | str = "10GB"
    compute: str = "auto"
    algorithm: str | None = None
    target: str = "modelopt"
    options: tuple[tuple[str, str], ...] = ()
    restart: bool = False
    report: str | Path | None = None
    low_memory: bool = False
    fold: bool | None = None
    unify_fp8: bool = False
    all_experts: bool = False
    fuse_experts: bool = True
    expert_coverage: float | None = None
    keep_source: bool = False

    def check(self) -> None:
        """Raise InputError for numbers, sizes and names that none of these can be."""
        if self.expert_coverage is not None and not 0 <= self.expert_coverage <= 1:
            raise InputError(f"expert_coverage is {self.expert_coverage}; give a share from 0 to 1")
        for field, least in LEAST.items():
            if (value := getattr(self, field)) < least:
                raise InputError(f"{field} is {value}; give at least {least}")
        for field in ("max_memory", "max_shard_size"):
            try:
                parse_size(getattr(self, field))
            except InputError as error:
                raise InputError(f"{field}: {error}") from error
        if self.compute not in COMPUTE_NAMES:
            raise nearest(self.compute, COMPUTE_NAMES, "compute")
        if self.report is not None:
            _check_new(Path(self.report))


def _check_new(folder: Path) -> None:
    """Raise InputError if `folder` cannot be the place of a new report."""
    try:
        here, taken = folder.resolve() == Path.cwd(), folder.exists() or folder.is_symlink()
        free = folder.is_dir() and not here and not any(folder.iterdir())
        above = next(parent for parent in folder.resolve().parents if parent.exists())
    except OSError as error:
        raise InputError(one_line(f"report: {folder}: {error.strerror}")) from error
    if taken and not free:
        raise InputError(
            one_line(f"report: {folder} exists; name a new directory, or remove what is there")
        )
    if not above.is_dir():
        raise InputError(one_line(f"report: {folder}: {above} is a file; name another directory"))
