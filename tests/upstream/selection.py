"""What runs, and which differences are known: the two TOML files of this folder."""

from __future__ import annotations

from pathlib import Path

import msgspec

FOLDER = Path(__file__).parent

#: Plain vLLM, vLLM with the connector, and the receiver's own API, in the order in which they run.
TARGETS = ("plain", "connector", "receiver")


class Group(msgspec.Struct, forbid_unknown_fields=True):
    """Files that share a model; `vllm` are options of both vLLMs."""

    vllm: list[str]


class File(msgspec.Struct, forbid_unknown_fields=True):
    """A test file below vLLM's `tests/`.

    `left_out` maps the beginning of a test's name to the reason why it does not run; `not_offered`
    a target to what it lacks for the whole file.
    """

    path: str
    group: str
    left_out: dict[str, str] = {}
    not_offered: dict[str, str] = {}


class Selection(msgspec.Struct, forbid_unknown_fields=True):
    """selection.toml; `left_out` maps files of which nothing runs to the reason."""

    groups: dict[str, Group]
    files: list[File]
    left_out: dict[str, str]


class Expected(msgspec.Struct, forbid_unknown_fields=True):
    """Tests, by the beginnings of their ids, that may fail on a target though vLLM passes them."""

    target: str
    tests: list[str]
    reason: str

    def covers(self, target: str, test: str) -> bool:
        """Whether this entry is about that test on that target."""
        return target == self.target and test.startswith(tuple(self.tests))


class _Differences(msgspec.Struct, forbid_unknown_fields=True):
    differences: list[Expected] = []


def read_selection() -> Selection:
    """selection.toml. Raises msgspec.ValidationError when it is not what the classes say."""
    return msgspec.toml.decode((FOLDER / "selection.toml").read_bytes(), type=Selection)


def read_expected() -> list[Expected]:
    """expected.toml. Raises msgspec.ValidationError when it is not what the classes say."""
    text = (FOLDER / "expected.toml").read_bytes()
    return msgspec.toml.decode(text, type=_Differences).differences
