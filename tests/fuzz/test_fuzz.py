"""Some 20,000 fuzzed cases in every run of the tests; ``python -m tests.fuzz`` tries more."""

from __future__ import annotations

import pytest

from tests.fuzz.targets import TARGETS, fuzz


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_a_peer_sends(name: str) -> None:
    cases = fuzz(name, TARGETS[name].examples)
    assert cases >= 500, f"only {cases} cases"
