# SPDX-License-Identifier: Apache-2.0
"""What one run will do, decided before it begins, from config.json and tensor headers."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from jqx.algorithms.table import variant_of
from jqx.config import KV_FORMATS, Choice, KVFormat, QuantConfig
from jqx.errors import InputError, nearest
from jqx.formats import find_format
from jqx.models import ModelSpec, param_shapes
from jqx.recipes import Recipe, find_kv, find_recipe, with_kv
from jqx.tensors import QTensor

from .architecture import optional_tensors, own_head, spec_of, together_for
from .attentions import Attention, attentions_of
from .checkpoints import (
    DTYPES,
    Checkpoint,
    TensorOut,
    check_tensors,
    model_dtype,
    open_checkpoint,
)
from .choices import (
    apply_options,
    calibrated,
    choices_for,
    input_bound,
    low_rank_of,
    refuse_unheard,
    wanted_kinds,
)
from .experts import check_coverage, linears_of_experts
from .folding import Folds, fold_all, plan_folds
from .fusing import Fusion, fusion_of
from .inventory import FLOATS, KEPT, Inventory, Module, take_inventory
from .keeping import kept_linears, kept_outputs, lies_fused
from .orientation import laid, laid_outputs
from .outlines import open_outline
from .outputs import outputs_of
from .settings import Settings
from .sources import as_floats
from .targets import (
    TARGETS,
    Target,
    find_algo,
    input_factor,
    low_rank_factors,
)
from .unfused import UnfusedCheckpoint, unfused

_NO_KV = "no keys and values: use --kv-cache none"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checkpoint, what the recipe says about each of its linears, and every tensor that will be
    written.

    `spec` is None for an architecture jqx does not define; `choices` holds the quantized linears in
    module order; `kv` the format of keys and values, if any; `dtype` the model's own.
    """

    checkpoint: Checkpoint
    spec: ModelSpec | None
    recipe: Recipe
    config: QuantConfig
    kv: str | None
    settings: Settings
    dtype: np.dtype
    inventory: Inventory
    choices: Mapping[str, Choice]
    outputs: tuple[TensorOut, ...]
    asked: Mapping[str, tuple[str, ...]] | None = None
    """Kinds of statistics by linear where they are collected for several recipes; None: those of
    this one.
    """
    kept: Mapping[str, Choice] = dataclasses.field(default_factory=dict)
    """Linears of a quantized source that stay as they are there."""

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Module path -> module."""
        return {module.path: module for module in self.inventory.modules}

    @cached_property
    def described(self) -> dict[str, Choice]:
        """All linears that are quantized in the destination, in module order."""
        return {p: c for p in self.modules if (c := self.choices.get(p) or self.kept.get(p))}

    @property
    def outlined(self) -> bool:
        """Whether there are no weights, only a config.json."""
        return not self.checkpoint.files

    @property
    def target(self) -> Target:
        """The layout that is written."""
        return TARGETS[self.settings.target]

    @property
    def needs_inputs(self) -> bool:
        """Whether some linear needs statistics of its inputs."""
        return any(self.wanted(path) for path in self.choices)

    def wanted(self, path: str) -> tuple[str, ...]:
        """The kinds of statistics that one linear needs of its inputs."""
        if self.asked is not None:
            return self.asked.get(path, ())
        found = wanted_kinds(self.config, self.choices[path])
        return tuple(dict.fromkeys((*found, "gram"))) if self.reports_outputs else found

    @property
    def reports_outputs(self) -> bool:
        """Whether the errors of outputs are measured: where asked for, and inputs can be had."""
        given = (self.spec, self.settings.activations, self.settings.stats)
        return self.settings.report is not None and any(x is not None for x in given)

    @cached_property
    def folds(self) -> Folds:
        """Which norms and linears take the factors of others."""
        if not self.fold or self.spec is None:
            return plan_folds(self.spec, self.choices)
        values = self.kv is None or not self.kv_format.affine
        return fold_all(self.spec, self.scaled, values=values)

    @cached_property
    def fusion(self) -> Fusion:
        """How experts that have linears of their own here are written in one tensor."""
        spec, steps = self.spec, self.config.steps
        if spec is None or not linears_of_experts(spec):
            return Fusion()
        searched = any(step.method != "max" for step in steps)
        one = any(choice.weight == "fp8" for choice in self.choices.values())
        stay = self.settings.fuse_experts and not (searched and one)  # one scale was not searched
        together = together_for(self.checkpoint.config, self.checkpoint.tensors)
        plain = isinstance(self.checkpoint, UnfusedCheckpoint)
        target = self.target if stay else None
        lying = {path: lies_fused(self.checkpoint, path) for path in self.kept}
        return fusion_of(together, spec, (self.described, lying), target, plain=plain)

    @property
    def fold(self) -> bool:
        """Whether there are factors of inputs and all of them are folded."""
        return bool(self.scaled) and _folds(self.settings)

    @cached_property
    def scaled(self) -> dict[str, Choice]:
        """The quantized linears whose algorithm scales input channels."""

        def scales(choice: Choice) -> bool:
            variant = variant_of(self.config.steps, find_format(choice.weight or ""))
            return variant in ("awq", "smooth")

        return {path: choice for path, choice in self.choices.items() if scales(choice)}

    @property
    def searches(self) -> bool:
        """Whether more is done than to reach the largest magnitudes."""
        reported = self.settings.report is not None
        rounded = self.target.half_scales  # to scales that float16 holds
        return reported or rounded or any(step.method != "max" for step in self.config.steps)

    def shares(self, path: str) -> bool:
        """Whether linears that read the same input share tensor scales and factors with `path`."""
        algo = find_algo(self.choices[path])
        if self.choices[path].weight == "fp8" and self.unifies_fp8(path):
            return True
        folded = self.fold and path in self.scaled  # a norm takes one factor for all that read it
        return folded or (algo is not None and algo.unified)

    def unifies_fp8(self, path: str) -> bool:
        """Whether FP8 linears that read the input of `path` have one scale: as asked, and always in
        an expert, of which engines make one matrix.
        """
        return self.settings.unify_fp8 or path in linears_of_experts(self.spec)

    def cast(self, name: str) -> bool:
        """Whether a tensor becomes one in the dtype of the model; integers do not, nor what decides
        between experts, which transformers keeps in float32, nor tensors of other models.
        """
        kept = name.endswith(KEPT) or name in self.inventory.carried
        return not kept and self.checkpoint.tensors[name].dtype in FLOATS

    @property
    def needs_kv(self) -> bool:
        """Whether the scales of keys and values must be found."""
        return self.kv is not None and not KV_FORMATS[self.kv].cast

    @property
    def kv_format(self) -> KVFormat:
        """How keys and values are stored. Only where `kv` is not None."""
        assert self.kv is not None
        return KV_FORMATS[self.kv]

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """The attention of every block, in order; none for an architecture that is not defined."""
        return tuple(attentions_of(self.spec, self.inventory)) if self.spec else ()

    def kv_outputs(self, attention: Attention) -> list[TensorOut]:
        """The tensors of the stored keys and values of one attention."""
        return attention.outputs(self.target, self.kv_format.affine, self.dtype)

    def linear_outputs(self, path: str) -> list[TensorOut]:
        """The tensors of one quantized linear."""
        if path in self.kept:
            return kept_outputs(self.checkpoint, path, self.target, (self.spec, self.dtype))
        module, choice = self.modules[path], self.choices[path]
        has_input_scale = input_bound(self.config, choice) is not None
        like = (choice, module.shape, self.dtype, has_input_scale)
        found = laid_outputs(self.spec, path, self.target.outputs(path, *like))
        if choice.variant is not None and self.folds.keeps(path):
            found.append(input_factor(path, module.shape, self.dtype))
        if choice.variant == "svd":
            found += low_rank_factors(path, module.shape, low_rank_of(self.config), self.dtype)
        return found

    def named(self, path: str, q: QTensor) -> Iterator[tuple[str, np.ndarray]]:
        """The named arrays of a linear, as they lie in files."""
        found = laid(self.spec, path, self.target.named(path, q))
        return ((name, np.asarray(array)) for name, array in found.items())

    @property
    def unquantized(self) -> tuple[str, ...]:
        """Every module that could have been quantized and is not."""
        paths = (*self.modules, *self.inventory.absent, *self.inventory.others)
        return tuple(path for path in paths if path not in self.described)


def prepare(
    model: str | Path, recipe: str | Recipe, settings: Settings, *, planned: bool = False
) -> Job:
    """Decide everything about a run. `planned`: it is not to be carried out, so that a config.json
    is enough. Raises InputError for whatever would stop it later.
    """
    checkpoint = open_outline(model) if planned else open_checkpoint(model)
    job = decide(checkpoint, recipe, settings)
    _refuse_unreached(job)
    if job.needs_kv and job.spec is None:
        raise InputError(
            f"--kv-cache {job.kv} needs the keys and values of the model, and model_type "
            f"{job.checkpoint.config.get('model_type')!r} is not defined here; "
            f"use --kv-cache none or one that ends in _cast"
        )
    if job.fold and job.spec is None:
        raise InputError(
            f"factors of inputs are folded into the weights before, and model_type "
            f"{job.checkpoint.config.get('model_type')!r} is not defined here: take another "
            "algorithm, or --no-fold with --target modelopt"
        )
    searched = [step.method for step in job.config.steps if step.method != "max"]
    if searched and settings.low_memory:
        raise InputError(
            "--low-memory compresses weights before any input is met, and "
            f"{', '.join(searched)} chooses more than the largest magnitudes: leave --low-memory "
            "out, or take --algorithm max"
        )
    if not planned:
        job.checkpoint.check_numbers()
    return dataclasses.replace(job, outputs=tuple(outputs_of(job)))


def decide(
    checkpoint: Checkpoint, recipe: str | Recipe, settings: Settings, *, in_memory: bool = False
) -> Job:
    """What the recipe says about each linear of a checkpoint. `in_memory`: nothing will be written,
    so formats need no name in a layout, and the model must be one that can be run.
    """
    settings.check()
    checkpoint = as_floats(checkpoint)
    row = find_recipe(recipe) if isinstance(recipe, str) else recipe
    if settings.target not in TARGETS:
        raise nearest(settings.target, TARGETS, "target")
    refuse_unheard(row.name, row.config)
    kv = row.kv_cache if settings.kv_cache is None else find_kv(settings.kv_cache)
    config = with_kv(apply_options(row.config, settings), kv)
    data_free = not calibrated(config) and (kv is None or KV_FORMATS[kv].cast)
    given = (settings.activations, settings.stats)
    recorded = not checkpoint.files or any(source is not None for source in given)
    spec = spec_of(checkpoint, must=in_memory or (not data_free and not recorded))
    if spec is not None:
        check_tensors(checkpoint, param_shapes(spec), optional_tensors(spec))
        spec = own_head(checkpoint, spec)
        checkpoint, spec = unfused(checkpoint, spec)
    inventory = take_inventory(checkpoint, spec)
    if (dtype_key := model_dtype(checkpoint)) not in FLOATS:
        raise InputError(
            f"{checkpoint.path} is a model in {dtype_key}; "
            f"those in {', '.join(sorted(FLOATS))} can be quantized"
        )
    target = TARGETS[settings.target]
    if kv is not None and kv not in target.kv_formats and not in_memory:
        held = f"keys and values in {', '.join(target.kv_formats)}, not in {kv}"
        raise InputError(f"{target.name} holds {held if target.kv_formats else _NO_KV}")
    written = None if in_memory else target
    choices = choices_for(config, inventory, row.name, written, fold=_folds(settings))
    check_coverage(checkpoint.tensors, choices, settings.expert_coverage)
    _refuse_idle(settings, choices)
    kept = kept_linears(checkpoint, inventory, choices, target) if settings.keep_source else {}
    return Job(
        checkpoint=checkpoint,
        spec=spec,
        recipe=row,
        config=config,
        kv=kv,
        settings=settings,
        dtype=DTYPES[dtype_key],
        inventory=inventory,
        choices=choices,
        outputs=(),
        kept=kept,
    )


def _refuse_idle(settings: Settings, choices: Mapping[str, Choice]) -> None:
    """Raise InputError for what was asked for and cannot be done with these formats."""
    if settings.fold and any(choice.variant == "svd" for choice in choices.values()):
        raise InputError(
            "a low-rank part folds into nothing: leave --fold out, or take another algorithm"
        )
    if settings.unify_fp8 and all(choice.weight != "fp8" for choice in choices.values()):
        raise InputError(
            "--unify-fp8 is for weights in fp8, and the recipe has none: leave it out, or take fp8"
        )


def _folds(settings: Settings) -> bool:
    """Whether factors of inputs may stay nowhere: as asked, else by what the layout holds."""
    return not TARGETS[settings.target].smooths if settings.fold is None else settings.fold


def _refuse_unreached(job: Job) -> None:
    """Calibration runs the blocks, so it meets no inputs of linears outside of them."""
    inside = {name for unit in job.inventory.blocks for name in job.inventory.units[unit]}
    met = job.settings.activations is None and job.settings.stats is None
    for path, choice in job.choices.items() if met else ():
        if wanted_kinds(job.config, choice) and path + ".weight" not in inside:
            raise InputError(
                f"the inputs of {path} are not calibrated here, only those of linears in blocks; "
                "quantize its weight alone, leave it out, or record its inputs for --activations"
            )
