"""The documents' tables and picture are what the cost model says today."""

from __future__ import annotations

import json

from bench import plan, worth
from bench.lab import RESULTS


def test_the_page_has_todays_tables() -> None:
    text = plan.PAGE.read_text()
    assert plan.page(text) == text
    for name in plan.TABLES:
        assert f"<!-- {name}: begin -->\n| " in text


def test_the_picture_is_of_todays_predictions() -> None:
    found = worth.result()
    assert json.loads((RESULTS / "worth.json").read_text()) == found
    for row in found["rows"]:
        assert row["total_s"][row["auto"]] == min(row["total_s"].values())
    assert {row["auto"] for row in found["rows"] if row["link"] == "1gbe"} >= {"meet"}
