# SPDX-License-Identifier: Apache-2.0
"""Linears whose scales are searched for: each by itself, then what they share, what is folded into
others, and their codes.

A block is one piece of work where factors are folded, since they move between its linears; without
them the linears that read one input are, and those of experts that are alike.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqx.algorithms import InputStats, Linear, calibrated, finished, stored
from jqx.algorithms.linear import TIED
from jqx.algorithms.quality import measure
from jqx.algorithms.shared import (
    gain_scaled,
    half_scaled,
    not_above_one,
    rows_scaled,
    unified,
    with_input_amax,
)
from jqx.algorithms.table import ALGORITHMS, apart, unscaled
from jqx.calibration import input_scale
from jqx.config import INPUT_FORMATS, Algorithm
from jqx.formats import Format, find_format
from jqx.tensors import QTensor

from .carrying import carried
from .choices import input_bound
from .job import Job
from .together import Asked, bunched, each
from .weights import (
    Groups,
    alike,
    checked_amax,
    fused_amax,
    one_scale,
    quotient_dtype,
    read_tensor,
    read_weight,
)

Named = tuple[str, np.ndarray]
Steps = tuple[Algorithm, ...]
Facts = dict[str, dict[str, float]]


class Search:
    """The linears `groups` of one unit, those that read one input together, and their `inputs`."""

    def __init__(self, job: Job, groups: Groups, inputs: Mapping[str, InputStats]):
        """Nothing is read yet."""
        self._job, self._groups, self._inputs = job, list(bunched(job, groups)), inputs
        self._steps = _divided(apart(job.config.steps) if job.fold else job.config.steps)
        self._linears: dict[str, Linear] = {}
        self._factors: dict[str, jax.Array] = {}  # what inputs are multiplied by in all
        self._row_factors: dict[str, jax.Array] = {}
        self.facts: Facts = {}
        """What was chosen for every linear, and the relative error of its outputs."""

    def run(self) -> Iterator[Named]:
        """The named arrays of all linears, and the other tensors that change with them. Raises
        InputError naming a weight that is not finite, or statistics that do not suffice.
        """
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            yield from self._settled().items()
            for path in self._paths():
                yield from self._encoded(path)

    def compressed(self) -> Iterator[tuple[str, QTensor]]:
        """All linears without scales of inputs, where no factors of inputs are chosen."""
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            folded = self._settled()
            assert not folded, f"factors change {', '.join(folded)}"
            for path in self._paths():
                q = self._finished(path)[1]
                yield path, q.replace(input_format=self._job.choices[path].input)

    def alone(self, *, unify: bool = False) -> Iterator[tuple[str, Linear]]:
        """All linears as if each were the only one, before their codes: nothing is folded, and
        nothing shared but, with `unify`, scales of those that read one input and have no factors.
        """
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            for groups in self._groups:
                together = unify and not any(p in self._job.scaled for g in groups for p in g)
                self._calibrate(groups, shared=together)
                for group in groups if together else ():
                    self._unify(group)
                for path in (path for group in groups for path in group):
                    yield path, self._linears.pop(path)

    def _settled(self) -> dict[str, np.ndarray]:
        """Choose everything but codes. Returns the other tensors that change."""
        for groups in self._groups:
            self._calibrate(groups)
        folded = dict(self._fold_rows())
        for group in (group for groups in self._groups for group in groups):
            self._unify(group)
        folded |= dict(self._fold_norms())
        for groups in self._groups:
            self._refine(groups)
            self._finish(groups)
        return folded

    def _paths(self) -> list[str]:
        return [path for groups in self._groups for group in groups for path in group]

    def changes(self) -> list[str]:
        """The tensors besides codes that `run` yields, as they are called in the checkpoint."""
        folds, mine = self._job.folds, self._paths()
        norms = dict.fromkeys(folds.norms[path] for path in mine if path in folds.norms)
        names = [f"{norm}.{leaf}" for norm in norms for leaf in ("weight", "bias")]
        names += [f"{folds.rows[path]}.bias" for path in mine if path in folds.rows]
        return [name for name in names if name in self._job.checkpoint.tensors]

    def _calibrate(self, groups: Groups, *, shared: bool = True) -> None:
        """Every member by itself; one amax for all of a group where they share the scale of tensors
        and it bounds what is searched.
        """
        asked = {path: a for group in groups for path, a in self._asked(group, shared)}
        self._linears.update(each(self._job, calibrated, asked))

    def _asked(self, group: tuple[str, ...], shared: bool) -> Iterator[tuple[str, Asked]]:
        """The members of a group before anything is searched."""
        job, weights, amax = self._job, {}, {}
        for path in group:
            weights[path] = read_weight(job, path)
            amax[path] = checked_amax(weights[path], path + ".weight")
        for path in group:
            inputs = self._inputs.get(path, {})
            linear = Linear(jnp.asarray(weights.pop(path)), input_amax=_input_amax(inputs))
            if self._format(path).tensor_bound is not None and _bounded(self._steps[0]):
                members = alike(job, group, path) if shared else [path]
                most = max(amax[p] for p in members)
                if shared and (whole := fused_amax(job, path)) is not None:
                    most = whole
                linear = linear._replace(tensor_amax=jnp.asarray(most))
            scales = job.folds.scales(path)
            steps = self._steps[0] if scales else unscaled(self._steps[0])
            yield path, Asked(linear, self._tied(path, inputs), steps)

    def _tied(self, path: str, inputs: InputStats) -> dict[str, Any]:
        """The statistics of a linear, with what says which of its channels must share a factor."""
        if (shared := self._job.folds.values.get(path)) is None:
            return dict(inputs)
        channels = np.arange(np.prod(shared), dtype=np.int32).reshape(shared)
        return {**inputs, TIED: np.moveaxis(channels, 1, 0).reshape(shared.group, -1)}

    def _format(self, path: str) -> Format:
        return find_format(self._job.choices[path].weight or "")

    def _fold_rows(self) -> Iterator[Named]:
        """Move factors into the rows of the linear before; yields its bias."""
        for source, target in self._job.folds.rows.items():
            if source not in self._linears:
                continue
            shared = self._job.folds.values.get(source)
            if shared is not None:  # what is stored of values may not grow
                self._linears[source] = not_above_one(self._linears[source])
            p = self._linears[source].pre_quant_scale
            assert p is not None
            self._factors[source] = p
            self._linears[source] = self._refitted(source)._replace(pre_quant_scale=None)
            if shared is not None:
                p = p.reshape(shared)[:, 0].reshape(-1)
            self._linears[target] = rows_scaled(self._linears[target], p)
            self._row_factors[target] = p
            if (name := f"{target}.bias") in self._job.checkpoint.tensors:
                yield name, np.asarray(gain_scaled(jnp.asarray(read_tensor(self._job, name)), p))

    def _refitted(self, path: str) -> Linear:
        """A linear with the largest magnitude of inputs that its factor leaves, where all factors
        are folded; elsewhere what ModelOpt has.
        """
        linear, stats = self._linears[path], self._inputs.get(path, {})
        if not self._job.fold or linear.input_amax is None or "channel_amax" not in stats:
            return linear
        return with_input_amax(linear, stats["channel_amax"])

    def _unify(self, group: tuple[str, ...]) -> None:
        """One input_scale, tensor scale and factor for members of one format."""
        alike: dict[Any, list[str]] = {}
        for path in group:
            if self._job.shares(path):
                alike.setdefault(self._job.choices[path], []).append(path)
        for paths in (paths for paths in alike.values() if len(paths) > 1):
            found = unified([self._linears[path] for path in paths], fmt=self._format(paths[0]))
            self._linears.update(zip(paths, found, strict=True))
        for path in group:
            self._fuse(path)

    def _fuse(self, path: str) -> None:
        """The scales of the tensor that an expert's linear will be a part of."""
        if (whole := fused_amax(self._job, path)) is None:
            return

        def largest(members: tuple[str, ...]) -> np.float32 | None:
            met = (_input_amax(self._inputs.get(member, {})) for member in members)
            known = [float(amax) for amax in met if amax is not None]
            return np.float32(max(known)) if known else None

        most = self._job.fusion.once(path, "inputs", largest)
        field = "amax" if self._format(path).tensor_bound is None else "tensor_amax"
        linear = self._linears[path]._replace(**{field: jnp.asarray(whole)})
        self._linears[path] = linear._replace(
            input_amax=None if most is None else jnp.asarray(most)
        )

    def _refine(self, groups: Groups) -> None:
        """The steps that come after inputs are scaled, with the factors that linears share."""
        if not self._steps[1]:
            return
        bounded = _bounded(self._steps[1])
        for paths in zip(*groups, strict=True):  # a member after the other: they share a scale
            for path, group in zip(paths, groups, strict=True):
                if self._format(path).tensor_bound is not None and bounded:
                    self._reach_all(path, group)
            self._met(paths, calibrated, self._steps[1])
        for group in groups:
            self._share_reach(group)

    def _reach_all(self, path: str, group: tuple[str, ...]) -> None:
        """One tensor scale for all that share it."""
        shared = alike(self._job, group, path)
        most = [jnp.max(jnp.abs(self._linears[p].weight)) for p in shared]
        reach = jnp.max(jnp.stack(most)).astype(jnp.float32)
        if (whole := fused_amax(self._job, path)) is not None:
            reach = jnp.asarray(whole)
        self._linears[path] = self._linears[path]._replace(tensor_amax=reach)

    def _share_reach(self, group: tuple[str, ...]) -> None:
        for path in group:
            reach = [self._linears[p].tensor_amax for p in alike(self._job, group, path)]
            known = [amax for amax in reach if amax is not None]
            if self._format(path).tensor_bound is not None and len(known) == len(reach):
                most = jnp.max(jnp.stack(known))  # the same again for the next of them
                self._linears[path] = self._linears[path]._replace(tensor_amax=most)

    def _finish(self, groups: Groups) -> None:
        """What comes last, when scales are settled."""
        steps = self._job.config.steps
        if any(ALGORITHMS[step.method].finish for step in steps):
            self._met([path for group in groups for path in group], finished, steps)

    def _met(self, paths: Iterable[str], run: Callable[..., Linear], steps: Steps) -> None:
        """Change linears with the statistics of inputs that were scaled, by them or before them."""
        asked, kept = {}, {}
        for path in paths:
            linear = self._linears[path]
            kept[path] = linear.pre_quant_scale
            scale = self._factors.get(path, kept[path])
            stats = dict(self._inputs.get(path, {}))
            asked[path] = Asked(linear._replace(pre_quant_scale=scale), stats, steps)
        for path, found in each(self._job, run, asked):
            self._linears[path] = found._replace(pre_quant_scale=kept[path])

    def _fold_norms(self) -> Iterator[Named]:
        """Move factors into the norm before; yields its gain and bias."""
        done: dict[str, jax.Array] = {}
        for path, norm in self._job.folds.norms.items():
            if path in self._linears:
                p = self._linears[path].pre_quant_scale
                assert p is not None
                assert np.array_equal(done.setdefault(norm, p), p), f"{norm} would take two factors"
                self._factors[path] = p
                self._linears[path] = self._refitted(path)._replace(pre_quant_scale=None)
        for norm, p in done.items():
            plus_one = norm in self._job.folds.plus_one
            gain = jnp.asarray(read_tensor(self._job, f"{norm}.weight"))
            yield f"{norm}.weight", np.asarray(gain_scaled(gain, p, plus_one=plus_one))
            if (name := f"{norm}.bias") in self._job.checkpoint.tensors:
                yield name, np.asarray(gain_scaled(jnp.asarray(read_tensor(self._job, name)), p))

    def _encoded(self, path: str) -> Iterator[Named]:
        job, choice, scale = self._job, self._job.choices[path], None
        linear, q = self._finished(path)
        if (bound := input_bound(job.config, choice)) is not None:
            assert linear.input_amax is not None
            row = INPUT_FORMATS[choice.input or ""]
            scale = input_scale(float(linear.input_amax), bound, path, row.code_max)
        q = q.replace(input_scale=scale, input_format=choice.input)
        self.facts[path] = {k: float(v) for k, v in linear.facts.items() if not np.ndim(v)}
        if job.settings.report:
            self.facts[path] |= self._measured(path, q)
        yield from job.named(path, q)
        job.checkpoint.release(path + ".weight")

    def _finished(self, path: str) -> tuple[Linear, QTensor]:
        """A linear that is done, and its codes and scales, without the scale of its inputs."""
        linear, fmt = self._linears.pop(path), self._format(path)
        if one_scale(fmt) and fmt.tensor_bound is None and linear.amax is not None:
            linear = linear._replace(amax=linear.amax.reshape(()))
        if self._job.target.half_scales:
            linear = half_scaled(linear, fmt=fmt)
        weight = linear.weight.astype(quotient_dtype(self._job, path))
        bare = linear._replace(facts={}, weight=weight)
        q = carried(self._job, path) or _stored(bare, fmt=fmt)
        return linear, q.replace(dtype=self._job.dtype)

    def _measured(self, path: str, q: QTensor) -> dict[str, float]:
        """How far the outputs of a stored linear are off, and what a report tells of its codes."""
        factor = self._factors.get(path, q.pre_quant_scale)
        weight = jnp.asarray(read_weight(self._job, path))
        rows = self._row_factors.get(path)
        found = measure(q, weight, (factor, rows), dict(self._inputs.get(path, {})))
        return {name: float(value) for name, value in found.items()}


def _input_amax(inputs: InputStats) -> jax.Array | None:
    """The largest magnitude of inputs, from whatever tells it."""
    if "amax" in inputs:
        return jnp.asarray(inputs["amax"], jnp.float32)
    return jnp.max(inputs["channel_amax"]) if "channel_amax" in inputs else None


def _bounded(steps: Steps) -> bool:
    """Whether a step searches scales of blocks below a tensor scale that is fixed."""
    return any(ALGORITHMS[step.method].bounded for step in steps)


def _divided(steps: Steps) -> tuple[Steps, Steps]:
    """The steps up to the last that scales inputs, and those after it: what linears that read one
    input share is settled in between.
    """
    last = max((i for i, s in enumerate(steps) if ALGORITHMS[s.method].variant), default=-1)
    return (steps[: last + 1], steps[last + 1 :]) if last >= 0 else (steps, ())


@partial(jax.jit, static_argnames=("fmt",))
def _stored(linear: Linear, *, fmt: Format) -> QTensor:
    return stored(linear, fmt)
