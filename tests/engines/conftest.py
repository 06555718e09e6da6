# SPDX-License-Identifier: Apache-2.0
"""Where the environments of the engines are."""

from pathlib import Path

import pytest

SCRIPTS = {"--engines": "make_env.sh", "--writers": "make_writer_env.sh"}


def environment(request, option: str) -> Path:
    """The directory that is given, or the test is skipped."""
    given = request.config.getoption(option)
    if given is None:
        script = f"tests/engines/{SCRIPTS[option]}"
        pytest.skip(f"{option} DIR is not given; bash {script} DIR makes one")
    if not (Path(given) / "bin" / "python").exists():
        raise pytest.UsageError(f"{option} {given}: there is no bin/python in it")
    return Path(given).absolute()


@pytest.fixture(scope="session")
def engines(request) -> Path:
    return environment(request, "--engines")


@pytest.fixture(scope="session")
def writers(request) -> Path:
    return environment(request, "--writers")
