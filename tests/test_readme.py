# SPDX-License-Identifier: Apache-2.0
"""The README's commands and programs run, its tables are those of the code, its links lead
somewhere. `python tests/test_readme.py` writes the tables anew.

CHANGELOG.md must name whatever is public.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

import jqx
import jqx_interop
from jqx.config import KV_FORMATS
from jqx.recipes import RECIPES
from jqx_interop import tables
from jqx_interop.cli.app import DEBUG, app
from jqx_interop.engine_table import engine_rows, recipe_choice, source_rows
from jqx_interop.kernel_table import kernel_rows
from jqx_interop.targets import find_algo

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
CHANGELOG = ROOT / "CHANGELOG.md"

TABLES = {
    "recipes": tables.recipe_rows,
    "algorithms": tables.algorithm_rows,
    "formats": tables.format_rows,
    "families": tables.family_rows,
    "targets": tables.target_rows,
    "quantized": tables.stored_rows,
    "kernels": kernel_rows,
    "engines": engine_rows,
    "sources": source_rows,
}
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

NOT_RUN = {
    "python3 -m venv": "makes the environment, which is there",
    ". .venv/bin/activate": "enters it",
    "pip install": "installs what is installed",
    "pre-commit install": "changes the repository",
    "pytest ": "would run this test again",
    "bash tests/engines/": "installs an engine",
    "python tests/engines/": "runs an engine",
    "jqx --install-completion": "changes the shell's configuration",
    "jqx quantize Qwen/": "fetches a model from the Hub",
}
"""How a command that is not run here begins, and why; it must parse all the same."""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def commands(block):
    """The lines of a block, those that a backslash or an operator at the end continues joined."""
    joined = re.sub(r"(\\|&&|\|)\n\s*", lambda m: m[1].replace("\\", "") + " ", block)
    return [line for line in joined.splitlines() if line.strip()]


def steps(block):
    """The single commands of a block."""
    return [step.strip() for line in commands(block) for step in line.split(" && ")]


def runnable(block):
    """The block without the commands of NOT_RUN."""
    kept = []
    for line in commands(block):
        run = [s.strip() for s in line.split(" && ") if not s.strip().startswith(tuple(NOT_RUN))]
        kept.append(" && ".join(run))
    return "\n".join(line for line in kept if line) + "\n"


def with_tables(text):
    return MARKED.sub(lambda m: f"{m[1]}{tables.markdown(TABLES[m[2]]())}\n{m[3]}", text)


def cli():
    return typer.main.get_command(app)


def options(command):
    return [name for parameter in command.params for name in parameter.opts if name[0] == "-"]


def shell(script, folder):
    """Run `script` as a reader would, with the programs of this environment and no network."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What the README calls a clone of this repository, as far as its commands look at it."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copy(README, folder)
    return folder


def test_every_command_and_program_runs(clone):
    for block in blocks("bash"):
        done = shell(runnable(block), clone)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    program = clone / "readme.py"  # its blocks are one session
    program.write_text("\n".join(blocks("python")), encoding="utf-8")
    done = shell("python readme.py", clone)
    assert done.returncode == 0, done.stderr
    assert "parameters quantized" in done.stdout
    made = {path.name for path in clone.iterdir() if (path / "config.json").is_file()}
    assert {"small-nvfp4", "small-int8", "small-mixed", "one-int8-layer"} <= made
    assert_the_table_is_of(json.loads((clone / "jqx-demo" / "results.json").read_text("utf-8")))


def assert_the_table_is_of(results):
    """The result table says what the demonstration found: sizes and bits exactly, the rest nearly,
    since machines round sums differently.
    """
    pattern = r"^\| `?(\w+)`? \| ([\d.]+) \| ([\d.]+) MB \| ([\d.]+) \| (?:([\d.]+) ±.* ([\d.]+)%)?"
    rows = {row[0]: row[1:] for row in re.findall(pattern, TEXT, re.MULTILINE)}
    assert list(rows) == ["none", *(row["recipe"] for row in results["rows"])]
    assert rows["none"][1] == f"{results['size'] / 1e6:.2f}"
    assert float(rows["none"][2]) == pytest.approx(results["perplexity"], rel=0.01)
    for row in results["rows"]:
        bits, size, perplexity, kl, top1 = rows[row["recipe"]]
        assert (bits, size) == (f"{row['bits']:.2f}", f"{row['size'] / 1e6:.2f}")
        assert float(perplexity) == pytest.approx(row["perplexity"], rel=0.01)
        assert float(kl) == pytest.approx(row["kl"], rel=0.1)
        assert float(top1) == pytest.approx(100 * row["top1"], abs=1)


def test_every_block_is_valid_shell():
    for block in blocks("bash"):
        done = subprocess.run(["bash", "-n", "-c", block], capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_options_exist_also_in_commands_that_are_not_run():
    known = cli().commands
    found = 0
    for block in blocks("bash"):
        for step in steps(block):
            words = shlex.split(step.split(" || ")[0]) if step.startswith("jqx ") else []
            if len(words) < 2:
                continue
            found += 1
            command = cli() if words[1].startswith("-") else known[words[1]]
            given = {word for word in words[1:] if word.startswith("--")}
            assert given <= {*options(command), DEBUG}, step
    assert found > 5


def test_what_is_not_run_is_there():
    found = [step for block in blocks("bash") for step in steps(block)]
    for beginning in NOT_RUN:
        assert any(step.startswith(beginning) for step in found), beginning


def test_the_first_line_that_runs_pytest_is_the_test_command():
    found = re.findall(r"^pytest .*$", TEXT, re.MULTILINE)
    assert found
    assert '-m "not slow and not engine"' in found[0]
    assert "--jaxtyping-packages=jqx,jqx_interop,jqx_kernels" in found[0]


def test_tables_are_those_of_the_code():
    assert {m[2] for m in MARKED.finditer(TEXT)} == set(TABLES)
    assert with_tables(TEXT) == TEXT, "write them again: python tests/test_readme.py"


def test_the_engine_table_has_every_recipe_under_its_name():
    named = {}
    for row in engine_rows():
        names = re.findall(r"`(\w+)`", row["recipe"])
        named |= {(name, row["target"].strip("`")): row["stored as"].strip("`") for name in names}
    assert {name for name, _ in named} == set(RECIPES)
    for recipe in RECIPES.values():
        algo = find_algo(recipe_choice(recipe))
        told = named.get((recipe.name, "modelopt"))
        assert told == (algo.quant_algo.upper() if algo else None), recipe.name


def test_every_kv_format_has_a_row():
    for name in ("none", *KV_FORMATS):
        assert f"\n| `{name}` | " in TEXT


def test_links_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif "://" not in link:
            assert (ROOT / link).exists(), link


@pytest.mark.parametrize(
    "path", [README, CHANGELOG, *ROOT.glob("training/*.*")], ids=lambda p: p.name
)
def test_no_path_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|opt|usr|Users)/", text)


def public():
    """Everything that CHANGELOG.md must name."""
    for module in (jqx, jqx_interop):
        yield from (f"{module.__name__}.{name}" for name in declared(module))
    yield from options(cli())
    for name, command in cli().commands.items():
        yield from (f"jqx {name}", *options(command))


def declared(module):
    text = Path(module.__file__).read_text(encoding="utf-8")
    return re.findall(r"^ *from \S+ import \w+ as (\w+)$", text, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(set(public())))
def test_the_changelog_names_it(name):
    assert f"`{name}`" in CHANGELOG.read_text(encoding="utf-8")


def test_public_names_are_found():
    assert {"QTensor", "observe"} <= set(declared(jqx))
    assert {"ptq", "load"} <= set(declared(jqx_interop))


if __name__ == "__main__":
    README.write_text(with_tables(TEXT), encoding="utf-8")
