# SPDX-License-Identifier: Apache-2.0
"""Strict JAX for the whole suite, where the shared material lies when there is any, and a model to
spoil.
"""

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import exports
import jax
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# the same examples every time, so that a failure can be had again; --hypothesis-profile=explore
# looks for new ones
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("same")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    """What tests/engines needs, which is not part of the environment of the other tests."""
    group = parser.getgroup("engines")
    group.addoption("--engines", help="the environment that tests/engines/make_env.sh made")
    group.addoption("--writers", help="the environment that tests/engines/make_writer_env.sh made")
    group.addoption("--engine-model", help="a checkpoint in the place of the bundled one")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests tell with `record_property("told", line)`, such as how near they came."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    told = [text for report in reports for name, text in report.user_properties if name == "told"]
    if told:
        terminalreporter.section("told by tests")
    for text in told:
        terminalreporter.write_line(str(text))


MAPPED = Path("/proc/self/maps")
MOST_MAPPED = 30_000
"""Mappings of memory; a process may have 65,530 by default, and dies where a compiled program needs
one more.
"""


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Forget compiled programs before there are too many for one process."""
    yield
    if MAPPED.exists() and MAPPED.read_bytes().count(b"\n") > MOST_MAPPED:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory with real exports of the reference tool; tests that need it are skipped without
    it.
    """
    if not (SHARED / "golden").is_dir():
        pytest.skip("no ../shared here")
    return SHARED


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A model, its calibration ids and its recorded inputs."""
    from source import MODEL  # late: jqx is imported after jaxtyping's hook is installed

    folder = tmp_path_factory.mktemp("original")
    exports.write_base(folder / MODEL, "llama")
    (folder / f"{MODEL}-ids.npy").rename(folder / "ids.npy")
    exports.write_activations(folder / "acts.safetensors", "llama")
    return folder


@pytest.fixture
def here(original: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of it all, the current directory."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """Quantized checkpoints to damage, each in a directory of its key."""
    from damage import save_all  # late, as above

    return save_all(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def copy(stored: Path, tmp_path: Path) -> Callable[[exports.Export], Path]:
    """Makes a copy of one of them."""
    return lambda row: shutil.copytree(stored / row.key, tmp_path / "model")
