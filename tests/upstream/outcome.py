"""What the tests' outcomes on the targets say: the differences from plain vLLM, and the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec

from tests.upstream.selection import TARGETS, Expected, Selection


class Outcome(msgspec.Struct, omit_defaults=True):
    """A test on a target: "passed", "failed" or "skipped", and why not passed."""

    outcome: str
    seconds: float
    message: str = ""


#: Outcomes by target, then by test id, which begins with the file's path below `tests/`.
Outcomes = dict[str, dict[str, Outcome]]


class Result(msgspec.Struct):
    """A run; `date` in ISO form, `minutes` of wall clock, which are those of the last whole run."""

    vllm: str
    date: str
    minutes: float
    machine: str
    versions: dict[str, str]
    outcomes: Outcomes


class Difference(msgspec.Struct):
    """A test that plain vLLM passes and a target does not; without `reason` it is an error."""

    target: str
    test: str
    message: str
    reason: str = ""


def differences(
    outcomes: Outcomes, selection: Selection, expected: list[Expected]
) -> Iterator[Difference]:
    """What plain vLLM passes and another target does not pass.

    A test without an outcome counts as failed, unless its file is not offered by the target.
    """
    offered = {file.path: file.not_offered for file in selection.files}
    for target in TARGETS[1:]:
        for test, plain in outcomes["plain"].items():
            if plain.outcome != "passed" or target in offered[file_of(test)]:
                continue
            found = outcomes[target].get(test) or Outcome("missing", 0.0, "it did not run")
            if found.outcome != "passed":
                reasons = [entry.reason for entry in expected if entry.covers(target, test)]
                yield Difference(target, test, found.message, next(iter(reasons), ""))


def replaced(whole: Result, part: Result, selection: Selection) -> Result:
    """A whole run with the outcomes of a part, file by file, and without what no longer runs.

    Raises ValueError when they are of different releases of vLLM.
    """
    if whole.vllm != part.vllm:
        raise ValueError(f"the last whole run was of vLLM {whole.vllm}: run all of {part.vllm}")
    files = {file.path: file for file in selection.files}
    fresh = {file_of(test) for tests in part.outcomes.values() for test in tests}

    def runs(test: str) -> bool:
        path, _, name = test.partition("::")
        return path in files and not name.startswith(tuple(files[path].left_out))

    outcomes = {
        target: {
            test: outcome
            for test, outcome in whole.outcomes[target].items()
            if runs(test) and file_of(test) not in fresh
        }
        | part.outcomes[target]
        for target in TARGETS
    }
    return msgspec.structs.replace(part, minutes=whole.minutes, outcomes=outcomes)


def unneeded(found: list[Difference], expected: list[Expected]) -> list[Expected]:
    """The expected differences of which none was found."""
    return [
        entry
        for entry in expected
        if not any(entry.covers(difference.target, difference.test) for difference in found)
    ]


def file_of(test: str) -> str:
    """The file of a test id."""
    return test.partition("::")[0]


def page(result: Result, selection: Selection, expected: list[Expected]) -> str:
    """docs/upstream.md."""
    return "\n".join(_page(result, selection, expected)) + "\n"


def _page(result: Result, selection: Selection, expected: list[Expected]) -> Iterator[str]:
    found = list(differences(result.outcomes, selection, expected))
    names = {"plain": "vLLM", "connector": "vLLM with the connector", "receiver": "the receiver"}
    yield "# vLLM's own tests"
    yield ""
    yield (
        f"`make upstream` runs the API tests of vLLM {result.vllm}, out of its source "
        "distribution, against a running `vllm serve`, one with `--kv-connector mac_decode`, and "
        "the receiver's own API. Only the environment is adapted: the server's URL and the "
        "model's name. What vLLM passes and another fails is an error unless "
        "[expected.toml](../tests/upstream/expected.toml) gives a reason; "
        "[selection.toml](../tests/upstream/selection.toml) says what runs. This page is what "
        f"it wrote on {result.date}; all of it takes {result.minutes:.0f} minutes on "
        f"{result.machine}. `make upstream ARGS=test_chat` runs files with that in their path "
        "again and replaces their rows."
    )
    yield ""
    yield "Passed / failed / skipped:"
    yield ""
    yield f"| file | {' | '.join(names.values())} |"
    yield f"|---|{'---|' * len(names)}"
    for file in selection.files:
        cells = [
            "not offered" if target in file.not_offered else _counts(result, target, file.path)
            for target in TARGETS
        ]
        yield f"| {file.path} | {' | '.join(cells)} |"
    yield f"| all | {' | '.join(_counts(result, target, '') for target in TARGETS)} |"
    yield ""
    yield "## What differs from vLLM"
    yield ""
    unexplained = [difference for difference in found if not difference.reason]
    explained = [entry for entry in expected if entry not in unneeded(found, expected)]
    for difference in unexplained:
        message = difference.message.replace("`", "'")
        yield f"- **{names[difference.target]}, not expected**: `{difference.test}`: `{message}`"
    for entry in explained:
        count = sum(entry.covers(each.target, each.test) for each in found)
        tests = ", ".join(f"`{test}`" for test in entry.tests)
        yield f"- {names[entry.target]}: {tests} ({count}): {entry.reason}"
    if not unexplained and not explained:
        yield "Nothing."
    yield ""
    yield "## What the receiver does not offer"
    yield ""
    lacks: dict[str, list[str]] = {}
    for file in selection.files:
        if reason := file.not_offered.get("receiver"):
            lacks.setdefault(reason, []).append(file.path)
    for reason, paths in lacks.items():
        yield f"- {reason}: {', '.join(f'`{path}`' for path in paths)}"
    yield ""
    yield "## What fails on plain vLLM, too"
    yield ""
    yield "With these models, on a CPU; it says nothing about the other two."
    yield ""
    for test, plain in result.outcomes["plain"].items():
        if plain.outcome == "failed":
            yield f"- `{test}`"
    yield ""
    yield "## What does not run"
    yield ""
    for path, reason in selection.left_out.items():
        yield f"- `{path}`: {reason}"
    for file in selection.files:
        for test, reason in file.left_out.items():
            yield f"- `{file.path}::{test}`: {reason}"


def _counts(result: Result, target: str, path: str) -> str:
    counts = Counter(
        found.outcome
        for test, found in result.outcomes[target].items()
        if not path or file_of(test) == path
    )
    return " / ".join(str(counts[outcome]) for outcome in ("passed", "failed", "skipped"))
