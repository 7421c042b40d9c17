"""Two test runs that share some of their files: each file is run by whoever comes to it first.

``python -m tests`` uses it, so that neither of its processes is idle for long while the other one
works, on whatever machine. Files are claimed in a folder, which an environment variable names;
another one says which of the two a process is, so that ``-m`` is free for whoever runs the tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

VARIABLE = "TESTS_SHARED"

#: "first", or "second", which has the tests marked ``beside``; both have those marked ``shared``.
HALF = "TESTS_HALF"

#: Of ``tests/e2e``, the longest first. Each starts servers of its own.
SHARED = ("test_families", "test_engine_modes", "test_agent", "test_precision", "test_whole",
          "test_pause", "test_lying_receiver", "test_proof")  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is shared comes last, what is the other run's goes."""
    others = [item for item in items if not _here(item)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if _here(item)]
    items.sort(key=_place)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """As pytest's own, but for files that the other run has claimed."""
    if session.testsfailed or session.config.option.collectonly:
        return None
    items = _mine(session.items)
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)
        item = following
    return True


def _here(item: pytest.Item) -> bool:
    beside = item.get_closest_marker("beside") is not None
    shared = item.get_closest_marker("shared") is not None
    return shared or beside == (os.environ[HALF] == "second")


def _place(item: pytest.Item) -> int:
    shared = item.get_closest_marker("shared") is not None
    return SHARED.index(item.path.stem) if shared else -1


def _mine(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Claims a file when its first test is asked for."""
    folder = Path(os.environ[VARIABLE])
    for path, tests in groupby(items, lambda item: item.path):
        found = list(tests)
        if found[0].get_closest_marker("shared"):
            try:
                (folder / path.stem).touch(exist_ok=False)
            except FileExistsError:
                continue
        yield from found
