# SPDX-License-Identifier: Apache-2.0
"""Every fault that is planted in a good checkpoint is found, under the name of its rule, with the
name of what is wrong; good checkpoints have none.
"""

from pathlib import Path

import numpy as np
import pytest
from planted import TENSOR_FAULTS
from planted_files import OTHER_FAULTS
from planted_models import MODEL_FAULTS
from planted_said import SAID_FAULTS
from served import F8, duplicate, make_all

from jqx_interop.engines import RULES, verify

FAULTS = TENSOR_FAULTS | OTHER_FAULTS | SAID_FAULTS | MODEL_FAULTS


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    return make_all(tmp_path_factory.mktemp("served"))


def findings(folder: Path, of: str) -> list:
    found = verify(folder)
    if of in ("faults", "warnings"):
        return list(getattr(found, of))
    verdict = next(v for v in found.verdicts if v.engine == of)
    return [*verdict.problems, *verdict.warnings]


OWN = {"affine": {"unread-tensor"}, "int4": {"needed-tensor"}, "mixed": {"needed-tensor"}}


@pytest.mark.parametrize("name", sorted({fault.base for fault in FAULTS.values()}))
def test_good_checkpoints_have_no_fault(good, name):
    found = verify(good[name])
    assert not found.faults
    assert {p.rule for p in found.warnings} <= {"model-type"}
    for verdict in found.verdicts:
        if verdict.engine in ("vllm", "sglang", "trtllm"):
            rules = {p.rule for p in verdict.problems}
            assert rules <= {"accepts"} | OWN.get(name, set()), verdict.line


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(good, tmp_path, fault):
    before = {(p.rule, p.text) for p in findings(good[fault.base], fault.of)}
    folder = duplicate(good[fault.base], tmp_path)
    fault.damage(folder)
    found = findings(folder, fault.of)
    told = [p for p in found if p.rule == fault.rule and fault.names in p.text]
    assert told, [(p.rule, p.text) for p in found]
    untouched = fault.rule in ("unread-tensor", "needed-tensor")
    assert untouched or any((p.rule, p.text) not in before for p in told)
    for problem in found:
        assert "\n" not in problem.text
        assert problem.rule in RULES
        assert problem.source
        assert problem.way_out


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_keeps_engines_from_loading_is_told_so(good, tmp_path, fault):
    if fault.of != "faults":
        pytest.skip("a finding of an engine, or a warning")
    folder = duplicate(good[fault.base], tmp_path)
    fault.damage(folder)
    found = verify(folder)
    assert not found.good
    for verdict in found.verdicts:
        spared = [verdict.engine in RULES[p.rule].spares or p.loads is True for p in found.faults]
        assert verdict.loads is not True or all(spared)


def test_many_kinds_of_faults_are_planted():
    planted = {fault.rule for fault in FAULTS.values()}
    assert len(FAULTS) >= 60
    unplanted = {"layout", "experts-format", "mixture", "kv-cache", "tied-head"}
    unplanted |= {"stacked-experts", "ignored-module"}
    assert planted | unplanted == set(RULES)


def test_e4m3_has_the_bits_that_the_look_at_numbers_takes_for_granted():
    assert np.isnan(np.array([0x7F, 0xFF], np.uint8).view(F8).astype(np.float32)).all()
    assert np.isfinite(np.arange(0x7F, dtype=np.uint8).view(F8).astype(np.float32)).all()
