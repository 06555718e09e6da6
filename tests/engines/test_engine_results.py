# SPDX-License-Identifier: Apache-2.0
"""What was measured with engines, as it is written down: it keeps to its limits, and the README
shows it. Needs no engine.
"""

import json

import pytest
from engine_cases import CASES
from engine_results import within
from engine_runs import ENGINES
from measure import README, RESULTS, dumped, load, merged, with_section

WRITTEN = load(RESULTS)
PLAIN = "none"
RAN = [row for row in WRITTEN["rows"] if row["difference"]]


def test_the_readme_shows_the_results():
    text = README.read_text(encoding="utf-8")
    assert "<!-- engines: measured -->" in text
    assert with_section(text, WRITTEN) == text, "write it again: python tests/engines/measure.py"


def test_the_file_is_as_it_is_written():
    assert RESULTS.read_text(encoding="utf-8") == dumped(WRITTEN)
    assert merged(WRITTEN["rows"], []) == WRITTEN["rows"]


def test_every_case_and_engine_was_tried_with_the_bundled_model():
    found = {
        (r["target"], r["recipe"], r["engine"]) for r in WRITTEN["rows"] if r["model"] == "bundled"
    }
    for case in CASES:
        for engine in ENGINES.values():
            if engine.targets is None or case.target in engine.targets:
                assert (case.target, case.title, engine.name) in found


@pytest.mark.parametrize(
    "row",
    [r for r in RAN if r["target"] != PLAIN],
    ids=lambda r: f"{r['model']}, {r['engine']}, {r['target']}: {r['recipe']}",
)
def test_what_ran_keeps_to_its_limit(row):
    plain = next(
        r for r in RAN
        if (r["model"], r["engine"], r["target"]) == (row["model"], row["engine"], PLAIN)
    )  # fmt: skip
    assert within(row, plain["difference"]), json.dumps(row)


def test_what_did_not_run_has_a_reason():
    for row in WRITTEN["rows"]:
        assert (row["difference"] is None) == bool(row["error"]), row
