# SPDX-License-Identifier: Apache-2.0
"""Every construct: seen, counted, rounded and differentiated as by hand."""

import pytest
import zoo_sharded
from devices import run_on_devices
from zoo_checks import CHECKS
from zoo_constructs import CASES


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]()


@pytest.mark.parametrize("check", CHECKS)
def test_constructs(case, check):
    CHECKS[check](case)


def test_constructs_on_several_devices():
    run_on_devices(
        zoo_sharded.DEVICES,
        "import zoo_checks, zoo_sharded\nzoo_checks.check_all(zoo_sharded.CASES)",
    )
