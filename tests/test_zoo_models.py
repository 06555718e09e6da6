# SPDX-License-Identifier: Apache-2.0
"""Models of every style: seen, counted, rounded and differentiated as by hand."""

import pytest
from zoo_checks import CHECKS
from zoo_models import CASES


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]()


@pytest.mark.parametrize("check", CHECKS)
def test_models(case, check):
    CHECKS[check](case)
