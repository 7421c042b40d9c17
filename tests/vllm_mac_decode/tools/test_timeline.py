"""The account of a hand-off: its rows, its figures, its trace and its pictures.

``data/handoff.json`` is a receiver's answer for 265 prompt tokens of a model of four layers.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from vllm_mac_decode.tools.timeline import (
    Handoff,
    TimelineError,
    milestones,
    parse,
    trace_events,
)
from vllm_mac_decode.tools.timeline import plot as timeline_plot
from vllm_mac_decode.tools.timeline import text as timeline_text

RECORDED = Path(__file__).parents[1] / "data" / "handoff.json"
MS = 1_000_000


@pytest.fixture
def answer() -> dict[str, Any]:
    """The recorded answer, to be changed."""
    return json.loads(RECORDED.read_text())


@pytest.fixture
def handoff() -> Handoff:
    return parse(RECORDED.read_bytes())


def parsed(answer: dict[str, Any]) -> Handoff:
    return parse(json.dumps(answer))


def test_a_recorded_answer_is_read(handoff: Handoff, answer: dict[str, Any]) -> None:
    assert (handoff.prompt_tokens, handoff.kv_bytes) == (265, 542720)
    assert handoff.layers == [0, 1, 2, 3]
    assert len(handoff.blocks) == 8
    assert handoff.outcome == "finished"
    assert handoff.clock_shift_ns == 0
    for block, raw in zip(handoff.blocks, answer["blocks"], strict=True):
        times = [block.computed_ns, block.gathered_ns, block.sent_ns, block.committed_ns]
        assert times == sorted(times)
        assert block.committed_ns + answer["opened_ns"] == raw["committed_ns"]
        assert handoff.resident[block.layer] >= block.committed_ns


def test_the_figures_follow_from_the_times(handoff: Handoff, answer: dict[str, Any]) -> None:
    figures = handoff.figures
    assert figures.prefill_ms == (answer["started_ns"] - answer["opened_ns"]) / MS
    assert figures.handoff_gap_ms == (answer["first_decoded_ns"] - answer["started_ns"]) / MS
    assert figures.exposed_ms == 0
    assert figures.hidden_share == 1


def test_kv_that_is_late_counts_as_exposed(answer: dict[str, Any]) -> None:
    late = answer["blocks"][-1]
    late["committed_ns"] = answer["complete_ns"] = answer["started_ns"] + 7 * MS
    figures = parsed(answer).figures
    assert figures.exposed_ms == 7
    assert figures.hidden_share == 7 / 8
    assert "87.5% of KV resident" in timeline_plot.caption(parsed(answer))


def test_the_forward_pass_has_no_gaps_and_goes_through_the_layers_in_order(
    handoff: Handoff,
) -> None:
    assert [interval.layer for interval in handoff.computed] == handoff.layers
    assert handoff.computed[0].start == 0
    assert all(a.end == b.start for a, b in itertools.pairwise(handoff.computed))
    assert handoff.computed[-1].end == handoff.last_computed_ns


def in_two_chunks(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer as if the prompt had been computed in two steps."""
    second = copy.deepcopy(answer["blocks"])
    for block in answer["blocks"]:
        block["tokens"] = 128
    for block in second:
        block |= {"token_start": 128, "tokens": 137}
        for name in ("computed", "gathered", "sent", "arrived", "committed"):
            block[f"{name}_ns"] += 60 * MS
    for name in ("complete_ns", "started_ns", "first_decoded_ns", "ended_ns"):
        answer[name] += 60 * MS
    answer["blocks"] += second
    return answer


def test_a_chunked_prefill_goes_through_the_layers_twice(answer: dict[str, Any]) -> None:
    handoff = parsed(in_two_chunks(answer))
    assert [interval.layer for interval in handoff.computed] == [0, 1, 2, 3] * 2
    assert handoff.computed[4].label == "layer 0: K, V of tokens 128..264"
    assert handoff.figures.hidden_share == 1


def test_two_machines_clocks_are_put_on_one_axis(answer: dict[str, Any], handoff: Handoff) -> None:
    transit = min(b.arrived_ns - b.sent_ns for b in handoff.blocks)
    for block in answer["blocks"]:
        for name in ("computed_ns", "gathered_ns", "sent_ns"):
            block[name] -= 3_000_000 * MS
    moved = parsed(answer)
    assert moved.clock_shift_ns == 3_000_000 * MS + transit
    for before, after in zip(handoff.blocks, moved.blocks, strict=True):
        assert after.computed_ns == before.computed_ns + transit
        assert after.sent_ns <= after.arrived_ns == before.arrived_ns


def test_a_request_that_ended_early_has_no_figures(answer: dict[str, Any]) -> None:
    for name in ("complete_ns", "started_ns", "first_decoded_ns"):
        answer[name] = 0
    handoff = parsed(answer)
    assert handoff.figures.prefill_ms is None
    assert [name for name, _ in milestones(handoff)] == ["last layer's K and V computed"]
    assert "before its first token" in timeline_plot.caption(handoff)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "\xff", '{"error": "no hand-off"}', '{"request_id": "a", "blocks": [1]}'],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(TimelineError, match="not a hand-off"):
        parse(text.encode("latin1"))


def test_a_hand_off_without_blocks_is_refused(answer: dict[str, Any]) -> None:
    answer["blocks"] = []
    with pytest.raises(TimelineError, match=answer["request_id"]):
        parsed(answer)


def slices(trace: dict[str, Any]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    found = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found[event["pid"], event["tid"]].append(event)
    return found


def names(trace: dict[str, Any], kind: str) -> list[str]:
    return [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == kind]


def test_the_trace_has_a_track_for_each_layer_of_each_stage(handoff: Handoff) -> None:
    trace = json.loads(json.dumps(trace_events(handoff)))
    assert [name.split(":")[1].split()[0] for name in names(trace, "process_name")] == [
        "compute",
        "gather",
        "send",
        "arrive",
    ]
    # Values are handed to the network while the keys are under way: a second track of the layer.
    tracks = [name for name in names(trace, "thread_name") if "(2)" not in name]
    assert tracks == [f"layer {layer}" for layer in range(4)] * 4
    slices_of = {pid: 0 for pid in range(1, 5)}
    for (pid, _), events in slices(trace).items():
        slices_of[pid] += len(events)
    assert slices_of == {1: 4, 2: 4, 3: 8, 4: 8}
    instants = {e["name"]: e["ts"] for e in trace["traceEvents"] if e["ph"] == "i"}
    assert handoff.first_token_ns is not None
    assert instants["first token (vLLM)"] == pytest.approx(handoff.first_token_ns / 1000)
    assert len(instants) == 4
    assert trace["otherData"]["request_id"] == handoff.request_id


def test_slices_on_one_track_never_overlap(answer: dict[str, Any]) -> None:
    # Two workers with one head each, whose blocks are under way at the same time.
    other = copy.deepcopy(answer["blocks"])
    for block in answer["blocks"]:
        block["heads"] = 1
    for block in other:
        block |= {"heads": 1, "head_start": 1}
        block["sent_ns"] += 1000
        block["arrived_ns"] += 1000
        block["committed_ns"] += 1000
    answer["blocks"] += other
    trace = trace_events(parsed(answer))
    assert "layer 0 (2)" in names(trace, "thread_name")
    for events in slices(trace).values():
        events.sort(key=lambda event: event["ts"])
        for before, after in itertools.pairwise(events):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-6
    assert any("heads 1..1" in event["name"] for event in trace["traceEvents"])


def drawn(handoff: Handoff, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(timeline_text.render(handoff, width))
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [60, 100, 160])
def test_the_terminal_picture_has_a_row_for_each_layer(handoff: Handoff, width: int) -> None:
    lines = drawn(handoff, width)
    rows = [line for line in lines if line.lstrip().startswith("layer")]
    assert [row.split()[1] for row in rows] == ["0", "1", "2", "3"]
    assert all(row.count("●") == 1 for row in rows)
    resident = [row.index("●") for row in rows]
    assert resident == sorted(resident)
    assert max(map(len, lines)) <= width
    (first,) = [line for line in lines if "first token (vLLM)" in line]
    (remote,) = [line for line in lines if "first remote token (MLX)" in line]
    # Each pointer stands below the column that its dotted line runs down in.
    first_at, remote_at = (
        next(line.index(c) for c in "┘└" if c in line) for line in (first, remote)
    )
    assert rows[0][first_at] == rows[0][remote_at] == "┊"
    assert remote_at > first_at > max(resident)


def test_the_axis_counts_in_round_milliseconds(handoff: Handoff) -> None:
    (axis,) = [line for line in drawn(handoff, 100) if "╵0 " in line]
    ticks = [float(word.strip("╵")) for word in axis.split() if word.startswith("╵")]
    assert ticks == [0, 20, 40, 60, 80, 100]


def test_the_picture_is_a_png(handoff: Handoff, tmp_path: Path) -> None:
    path = timeline_plot.draw(handoff, tmp_path / "handoff.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_svg_says_what_it_shows(answer: dict[str, Any], tmp_path: Path) -> None:
    answer["blocks"][-1]["committed_ns"] = answer["started_ns"] + 7 * MS
    path = timeline_plot.draw(parsed(answer), tmp_path / "handoff.svg")
    texts = {e.text for e in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")}
    assert {"layer 0", "layer 3", "vLLM prefill", "KV transfer", "MLX decode"} <= texts
    assert {"first token (vLLM)", "first remote token (MLX)"} <= texts
    assert "265 prompt tokens, 4 layers, 0.5 MiB of KV" in texts
    assert any(text and text.startswith("exposed") for text in texts)


def test_the_same_times_give_the_same_svg(handoff: Handoff, tmp_path: Path) -> None:
    one = timeline_plot.draw(handoff, tmp_path / "one.svg")
    two = timeline_plot.draw(handoff, tmp_path / "two.svg")
    assert one.read_bytes() == two.read_bytes()
