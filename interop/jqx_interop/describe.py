# SPDX-License-Identifier: Apache-2.0
"""The JSON files that tell an engine what a checkpoint holds."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jqx.config import Choice

from .job import Job
from .targets import TARGETS


def write_descriptions(job: Job, folder: Path) -> None:
    """Write config.json, and what else the layout has, for what `job` quantized."""
    described = (job.described, job.unquantized, job.kv)
    describe(folder, job.checkpoint.config, described, job.settings.target)


def describe(
    folder: Path,
    config: Mapping[str, Any],
    described: tuple[Mapping[str, Choice], Iterable[str], str | None],
    target: str,
) -> None:
    """Write config.json, which is `config` with `quantization_config` added last, and the other
    files of the layout `target`.

    `described`: quantized modules in module order, the others, and the format of the KV cache.
    """
    row = TARGETS[target]
    content = {k: v for k, v in config.items() if k != "quantization_config"}
    content["quantization_config"] = row.quantization_config(*described)
    _write(folder / "config.json", content)
    for name, content_of in row.files.items():
        _write(folder / name, content_of(*described))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False), encoding="utf-8")
