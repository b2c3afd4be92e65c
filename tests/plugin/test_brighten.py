"""What the author of a method puts into his own tests."""

import pytest
from augbench_example.good import Brighten

from augbench import contract


@pytest.mark.parametrize("case", contract.CASES, ids=str)
@pytest.mark.parametrize("name", contract.CHECKS)
def test_contract(name, case):
    contract.check(name, lambda: Brighten(strength=0.3), case)
