# SPDX-License-Identifier: Apache-2.0
"""Every construct and every kind of model: seen, counted, rounded and differentiated as by hand."""

import pytest
from zoo_checks import CHECKS
from zoo_constructs import CASES


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]()


@pytest.mark.parametrize("check", CHECKS)
def test_zoo(case, check):
    CHECKS[check](case)
