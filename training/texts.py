# SPDX-License-Identifier: Apache-2.0
"""Write the bundled evaluation text: `python -m training.texts TEXT`."""

import sys
from importlib.resources import files
from pathlib import Path

from .text import evaluation_text, read_corpus


def main() -> None:
    """Write it where the package keeps it."""
    path = Path(str(files("jqx_interop.data").joinpath("evaluation.txt")))
    path.write_text(evaluation_text(read_corpus(Path(sys.argv[1]))), "utf-8")


if __name__ == "__main__":
    main()
