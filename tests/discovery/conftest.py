"""Discovery without the pauses that a network needs."""

from collections.abc import Iterator

import pytest

from mlx_receiver.discovery import browse, stations, trouble


@pytest.fixture(scope="package", autouse=True)
def _impatient() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stations, "CHECK_SECONDS", 0.3)
        patch.setattr(trouble, "PATIENCE_SECONDS", 1.0)
        patch.setattr(browse, "_ASK_MS", 1000)
        yield
