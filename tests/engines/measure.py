# SPDX-License-Identifier: Apache-2.0
"""What engines make of exports: `python tests/engines/measure.py DIR`, DIR made by make_env.sh.

Writes results.json beside this file, and the README's table from it. Rows that are there already
are kept where they are not measured again.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from engine_cases import CASES, Case, export_all
from engine_results import Here, Outcome, compare, picked
from engine_runs import BUNDLED, ENGINES, Engine, prompts_of, run

from jqx_interop import tables

RESULTS = Path(__file__).with_name("results.json")
README = Path(__file__).resolve().parents[2] / "README.md"
PLAIN = Case(target="none", recipe="none")
ID = ("model", "target", "recipe", "engine")
COLUMNS: dict[str, Callable[[str, str], str]] = {}
"""Further columns of the table, for engines that cannot run here: heading -> what is said of a
layout and a recipe.
"""

MARKED = re.compile(r"(<!-- engines: measured -->\n).*?(<!-- end -->)", re.DOTALL)


def measured(
    model: Path,
    name: str,
    engine: Engine,
    environment: Path,
    exports: dict[Case, Path],
    folder: Path,
) -> Iterator[tuple[Outcome, dict[str, str]]]:
    """What `engine` makes of the unquantized `model` and of its `exports`, and its versions."""
    prompts = prompts_of(model)
    plain = picked(Here(model).logprobs(prompts)[:, :-1], prompts[:, 1:])
    read = {
        c: p for c, p in exports.items() if engine.targets is None or c.target in engine.targets
    }
    read = {PLAIN: model, **read}
    answers = run(engine, environment, {c.key: p for c, p in read.items()}, prompts, folder)
    for case, path in read.items():
        answer = answers[case.key]
        here = Here(path, engine)
        fields = {"kind": here.kind(engine), **compare(answer, here, plain, prompts)}
        where = {"model": name, "target": case.target, "recipe": case.title}
        outcome = Outcome(**where, engine=engine.name, dtype=engine.dtype, **fields)
        yield outcome, answer.get("versions", {})


def merged(old: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows, new ones in the place of old ones, in the order of CASES and ENGINES."""
    rows = {tuple(row[key] for key in ID): row for row in (*old, *new)}
    cases = [PLAIN.key, *(case.key for case in CASES)]
    models = list(dict.fromkeys(row["model"] for row in rows.values()))

    def place(row: dict[str, Any]) -> tuple[int, int, int]:
        key = f"{row['target']}: {row['recipe']}"
        known = cases.index(key) if key in cases else len(cases)
        return models.index(row["model"]), known, list(ENGINES).index(row["engine"])

    return sorted(rows.values(), key=place)


def cell(row: dict[str, Any] | None) -> str:
    """What the table says of one outcome."""
    if row is None:
        return ""
    if row["difference"] is None:
        return "does not run" if row["loads"] else "does not load"
    sizes = ", ".join(f"{d:.2f}" if d >= 0.005 else f"{d:.0e}" for d in row["difference"])
    return f"{sizes}; {row['same']}/{row['tokens']}"


def table_rows(results: dict[str, Any]) -> tables.Rows:
    """The README's table."""
    groups: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault(tuple(row[key] for key in ID[:3]), {})[row["engine"]] = row
    return [
        {
            "model": model,
            "layout": "" if target == "none" else target,
            "recipe": recipe,
            "effect": _effect(by_engine.values()),
            **{engine: cell(by_engine.get(engine)) for engine in ENGINES},
            **{heading: say(target, recipe) for heading, say in COLUMNS.items()},
        }
        for (model, target, recipe), by_engine in groups.items()
    ]


def _effect(rows: Iterable[dict[str, Any]]) -> str:
    mean, largest = next(iter(rows))["effect"]
    return f"{mean:.2f}, {largest:.1f}" if mean > 1e-3 else ""


def reasons(results: dict[str, Any]) -> str:
    """In the engines' own words, why something did not run, a line each."""
    said: dict[tuple[str, str], list[str]] = {}
    for row in results["rows"]:
        if row["error"]:
            words = " ".join(row["error"].split()).removesuffix(" Reasons:")[:160]
            said.setdefault((row["engine"], words), []).append(row["recipe"])
    return "\n".join(
        f"- {engine}, {'; '.join(dict.fromkeys(where))}: `{words}`"
        for (engine, words), where in said.items()
    )


def section(results: dict[str, Any]) -> str:
    """What lies between the README's markers."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    table = tables.markdown(table_rows(results))
    return f"Measured with {versions}.\n\n{table}\n\n{reasons(results)}"


def with_section(text: str, results: dict[str, Any]) -> str:
    """The README with what was measured."""
    return MARKED.sub(lambda m: f"{m[1]}{section(results)}\n{m[2]}", text)


def load(path: Path) -> dict[str, Any]:
    """The results so far."""
    if not path.exists():
        return {"versions": {}, "rows": []}
    return json.loads(path.read_text(encoding="utf-8"))


def asked() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environment", type=Path, nargs="?", help="made by make_env.sh")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="a checkpoint to export")
    parser.add_argument("--name", default="bundled", help="what it is called in the results")
    parser.add_argument("--case", action="append", help="a glob of cases, such as 'modelopt: fp8*'")
    parser.add_argument("--engine", action="append", choices=list(ENGINES))
    parser.add_argument("--target", help="with --recipe: a case that is not in the table")
    parser.add_argument("--recipe", help="the name of a recipe, or a recipe file")
    parser.add_argument("--set", action="append", default=[], help="as for jqx quantize")
    parser.add_argument("--kv-cache", help="as for jqx quantize")
    parser.add_argument(
        "--folder", type=Path, help="keeps the exports, which are then not made again"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def cases_of(given: argparse.Namespace) -> list[Case]:
    """The cases that are asked for."""
    if given.recipe:
        more = {"kv": given.kv_cache, "options": dict(word.split("=", 1) for word in given.set)}
        return [Case(target=given.target or "modelopt", recipe=given.recipe, **more)]
    wanted = given.case or ["*"]
    return [case for case in CASES if any(fnmatch(case.key, glob) for glob in wanted)]


def main() -> None:
    """Measure what is asked for, and write it down after every engine."""
    given = asked()
    results = load(given.results)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if given.environment is not None:
            exports, refused = export_all(cases_of(given), given.model, folder)
            for case, why in refused.items():
                print(f"{case.key} is not exported: {why}")
            for name in given.engine or ENGINES:
                where = (given.model, given.name, ENGINES[name])
                for outcome, versions in measured(*where, given.environment, exports, folder):
                    results["versions"] |= versions
                    results["rows"] = merged(results["rows"], [outcome.to_json()])
                    given.results.write_text(dumped(results), encoding="utf-8")
                    print(outcome.to_json(), flush=True)
    if given.results == RESULTS:
        text = README.read_text(encoding="utf-8")
        README.write_text(with_section(text, results), encoding="utf-8")


def dumped(results: dict[str, Any]) -> str:
    """JSON with a line for every row."""
    lines = ",\n".join(f"  {json.dumps(row)}" for row in results["rows"])
    versions = json.dumps(results["versions"])
    return f'{{\n "versions": {versions},\n "rows": [\n{lines}\n ]\n}}\n'


if __name__ == "__main__":
    main()
