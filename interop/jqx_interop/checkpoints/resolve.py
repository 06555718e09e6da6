# SPDX-License-Identifier: Apache-2.0
"""MODEL, a directory, a Hub id or the word "bundled", becomes a directory."""

import re
from importlib.resources import files
from pathlib import Path
from textwrap import shorten

from jqx.errors import InputError

from .problems import one_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

# What is fetched of a Hub repository: weights in safetensors, JSON, tokenizers, texts. Never
# pickles, never code.
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*"]
BUNDLED = "bundled"  # MODEL that is the small model of this package
NOT_FETCHED = ["*/*", "consolidated*"]  # folders, and the same weights in a second layout


def resolve_model(model: str | Path) -> Path:
    """The directory of `model`: itself if it is one, that of the model in this package for
    "bundled", else the snapshot of that Hub id.

    huggingface_hub fetches what its cache lacks and is content with the cache when there is no
    network. Raises InputError if there is neither such a directory nor such a Hub id.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(one_line(f"{model}: is a file. Give the directory that holds it."))
    if str(model) == BUNDLED:
        return bundled_model()
    if not HUB_ID.fullmatch(str(model)):
        raise InputError(
            one_line(f"{model}: no such directory, not a Hub id (org/name), not '{BUNDLED}'.")
        )
    return _snapshot(str(model))


def bundled_model() -> Path:
    """The directory of the small Llama that travels with this package."""
    return Path(str(files("jqx_interop.demo").joinpath("model")))


def _snapshot(hub_id: str) -> Path:
    import huggingface_hub  # half a second that a local directory does not need

    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, allow_patterns=HUB_FILES, ignore_patterns=NOT_FETCHED
            )
        )
    except Exception as error:  # its own, the HTTP client's and the operating system's
        reason = shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        raise InputError(
            one_line(
                f"{hub_id}: no such directory, and the Hub has not given it ({reason}). "
                "Give a directory, or fetch it where there is a network: hf download " + hub_id
            )
        ) from error
