# SPDX-License-Identifier: Apache-2.0
"""The two JSON files that tell an engine what a checkpoint holds."""

import json
from pathlib import Path
from typing import Any

from .job import Job
from .targets import TARGETS


def write_descriptions(job: Job, folder: Path) -> None:
    """Write config.json, the source's with `quantization_config` added last, and
    hf_quant_config.json.
    """
    target = TARGETS[job.settings.target]
    described = (job.choices, job.unquantized, job.kv)
    config = {k: v for k, v in job.checkpoint.config.items() if k != "quantization_config"}
    config["quantization_config"] = target.quantization_config(*described)
    _write(folder / "config.json", config)
    _write(folder / "hf_quant_config.json", target.describe(*described))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False), encoding="utf-8")
