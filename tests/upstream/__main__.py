"""Runs vLLM's own tests against vLLM, vLLM with the connector, and the receiver.

    python -m tests.upstream             # all; writes docs/upstream.md and results.json
    python -m tests.upstream test_chat   # files with this in their path; replaces their outcomes

The exit status is 1 when plain vLLM passes a test that another target fails without a reason in
expected.toml, and 2 when the tests could not be run.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.lab import record
from tests.upstream import models, source, targets
from tests.upstream.outcome import Outcomes, Result, differences, page, replaced, unneeded
from tests.upstream.selection import TARGETS, Selection, read_expected, read_selection
from vllm_mac_decode.tools.demo.model import ModelUnavailable

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "upstream.md"
RESULTS = Path(__file__).with_name("results.json")


def main() -> int:
    """Run what the arguments name, write the page, and print the differences."""
    # An end from outside must stop the servers, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(stderr=True)
    wanted = sys.argv[1:]
    selection, expected = read_selection(), read_expected()
    started = time.monotonic()
    try:
        version = source.installed_version()
        outcomes = run(selection, version, wanted, console)
    except (targets.GateError, source.SourceUnavailable, ModelUnavailable) as error:
        console.print(str(error), style="red", markup=False)
        return 2
    origin = record("vLLM's own tests")
    result = Result(
        vllm=version,
        date=origin["date"].partition(" ")[0],
        minutes=round((time.monotonic() - started) / 60, 1),
        machine=f"{origin['machine']['cores']} cores of {origin['machine']['cpu']}",
        versions=origin["versions"],
        outcomes=outcomes,
    )
    if wanted:
        whole = msgspec.json.decode(RESULTS.read_bytes(), type=Result)
        try:
            result = replaced(whole, result, selection)
        except ValueError as error:
            console.print(str(error), style="red")
            return 2
    RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    PAGE.write_text(page(result, selection, expected))
    found = list(differences(result.outcomes, selection, expected))
    for entry in unneeded(found, expected):
        console.print(f"No longer differs, take it out of expected.toml: {entry.tests}")
    for difference in found:
        state = f"expected: {difference.reason}" if difference.reason else "NOT EXPECTED"
        line = f"{difference.target}: {difference.test}: {difference.message} ({state})"
        console.print(line, markup=False, soft_wrap=True)
    for target, tests in outcomes.items():
        passed = sum(outcome.outcome == "passed" for outcome in tests.values())
        console.print(f"{target}: {passed} of {len(tests)} passed")
    return int(any(not difference.reason for difference in found))


def run(selection: Selection, version: str, wanted: list[str], console: Console) -> Outcomes:
    """The outcomes of the selected files whose path has one of `wanted` in it, if there are any.

    Raises GateError, SourceUnavailable or ModelUnavailable.
    """
    outcomes: Outcomes = {target: {} for target in TARGETS}
    made = {"wandering": models.wandering, "ending": models.ending}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with targets.scratch() as scratch, Progress(*columns, console=console) as progress:
        folder = Path(scratch)
        console.print(f"Fetching the tests of vLLM {version}")
        source.unpack(source.fetch(version), folder)
        source.add_own_tests(folder)
        for name, group in selection.groups.items():
            files = [
                file
                for file in selection.files
                if file.group == name and (not wanted or any(part in file.path for part in wanted))
            ]
            if not files:
                continue
            model = made[name]()
            source.place_model(folder / "cwd", model)
            console.print(f"Starting vLLM twice, and the receiver, with the {name} model")
            with targets.servers(model, folder, group.vllm) as urls:
                for target in TARGETS:
                    offered = [file for file in files if target not in file.not_offered]
                    if not offered:
                        continue
                    task = progress.add_task(f"{name} model, {target}", total=None)

                    def report(message: dict[str, Any], task: Any = task) -> None:
                        if "total" in message:
                            progress.update(task, total=message["total"])
                        elif "test" in message:
                            progress.advance(task)
                            if not console.is_terminal:
                                line = f"{message['outcome']:8} {message['seconds']:6.1f} s"
                                print(f"{line}  {message['test']}", flush=True)

                    log = folder / f"{name}-{target}.log"
                    outcomes[target] |= targets.run(target, urls, offered, folder, log, report)
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
