"""What happens between two decode steps under load: prompts that come together, jobs that join,
a front and a prompt that want the same time."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_receiver.decode import batch as batch_module
from mlx_receiver.decode import fronts as fronts_module
from mlx_receiver.decode.batch import Batch, Float32Logits
from mlx_receiver.decode.engine import DecodeEngine
from mlx_receiver.decode.fronts import Fronts
from mlx_receiver.decode.jobs import Job, Output
from mlx_receiver.decode.local import LocalJob, generate_tokens
from mlx_receiver.decode.model import LoadedModel, ModelSource, find_model, load_model
from mlx_receiver.wire.messages import Opened, WireError
from mlx_receiver.wire.sampling import Sampling
from tests.mlx_receiver.client import connected, started
from tests.mlx_receiver.conftest import Prefill
from tests.waiting import eventually

GREEDY = Sampling(max_tokens=8, temperature=0.0)
ENDLESS = Sampling(max_tokens=7000, temperature=0.0)

Llama = tuple[ModelSource, LoadedModel]


@pytest.fixture(scope="module")
def llama(tiny_llama_path: Path) -> Llama:
    source = find_model(str(tiny_llama_path))
    return source, load_model(source)


class Nobody:
    def decoded(self, outputs: list[Output]) -> None: ...

    def failed(self, job: Job, code: str, reason: str) -> None: ...


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forward."""
    seen: list[int] = []
    forward = Float32Logits.__call__

    def watched(self: Float32Logits, inputs: mx.array, cache: Any = None) -> Any:
        seen.append(inputs.size)
        return forward(self, inputs, cache)

    monkeypatch.setattr(Float32Logits, "__call__", watched)
    return seen


def prompts(llama: Llama, count: int, tokens: int) -> Batch:
    """A batch that so many prompts have just joined."""
    made = Batch(*llama, 16)
    for number in range(count):
        made.add(made.prepare(Job([30 + number] * tokens, GREEDY, Nobody())))
    return made


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_prompts_that_come_together_share_a_chunk(
    llama: Llama, forwards: list[int], count: int, share: float
) -> None:
    """However long it was for one of them alone."""
    batch = prompts(llama, count, 400)
    batch._chunk = 256
    batch.step(share)
    each = max(16, int(256 * share) // count)
    assert batch.prefilled[0] == each * count
    assert forwards == [each * count], "it is one forward"
    batch.close()


def test_the_end_of_a_prompt_says_nothing_of_a_chunk(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "PREFILL_SECONDS", 100.0)
    batch = prompts(llama, 1, 515)
    batch._chunk = 512
    batch.step()
    assert (batch.prefilled[0], batch._chunk) == (512, 1024)
    batch.step()
    assert (batch.prefilled[0], batch._chunk) == (2, 1024)
    batch.close()


def test_a_chunk_that_was_short_on_purpose_makes_the_next_no_shorter(
    llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_module, "PREFILL_SECONDS", 100.0)
    batch = prompts(llama, 1, 4000)
    batch._chunk = 512
    for _ in range(4):
        batch.step(0.25)
        assert batch.prefilled[0] == 128
    assert batch._chunk == 512
    batch.close()


@pytest.mark.parametrize(("seconds", "chunk"), [(0.02, 512), (0.3, 16)])
def test_the_shortest_chunk_makes_the_next_no_shorter_unless_it_is_too_long(
    llama: Llama, monkeypatch: pytest.MonkeyPatch, seconds: float, chunk: int
) -> None:
    """It is computed where others have used all the time, and takes little less than a longer one:
    most of it is reading the weights."""
    forward = Float32Logits.__call__

    def slowly(self: Float32Logits, inputs: mx.array, cache: Any = None) -> Any:
        time.sleep(seconds)
        return forward(self, inputs, cache)

    monkeypatch.setattr(Float32Logits, "__call__", slowly)
    batch = prompts(llama, 1, 4000)
    batch._chunk = 512
    for _ in range(2):
        batch.step(0.0)
        assert batch.prefilled[0] == 16
    assert batch._chunk == chunk
    batch.close()


@pytest.fixture
def engine(tiny_llama_path: Path) -> Iterator[DecodeEngine]:
    made = DecodeEngine(find_model(str(tiny_llama_path)), max_batch=16)
    made.start()
    made.wait_loaded()
    yield made
    made.stop()


class Seen:
    """What the batch does: jobs that join it, those with GREEDY within ``seconds``, and its steps,
    which wait while ``steps`` is not set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> None:
        self.steps = threading.Event()
        self.steps.set()
        self._events: queue.SimpleQueue[str] = queue.SimpleQueue()
        prepare, step = Batch.prepare, Batch.step

        def prepared(batch: Batch, job: Job) -> Any:
            if job.sampling is GREEDY:
                time.sleep(seconds)
                self._events.put("j")
            return prepare(batch, job)

        def stepped(batch: Batch, *share: float) -> Any:
            self.steps.wait()
            self._events.put("s")
            return step(batch, *share)

        monkeypatch.setattr(Batch, "prepare", prepared)
        monkeypatch.setattr(Batch, "step", stepped)

    def joined(self) -> list[int]:
        """How many did between two steps, where any did."""
        text = ""
        while not self._events.empty():
            text += self._events.get()
        return [len(joins) for joins in text.replace("s", " ").split()]


def test_jobs_that_copy_when_they_join_do_not_all_join_in_one_gap(
    engine: DecodeEngine, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier text left may be gigabytes."""
    kv, seen = prefill(17), Seen(monkeypatch, seconds=0.1)
    running = LocalJob(engine, [30, 31], ENDLESS)
    running.next(20)
    seen.steps.clear()  # they are all there when the next step begins
    jobs = [LocalJob(engine, kv.prompt, GREEDY) for _ in range(6)]
    seen.steps.set()
    for job in jobs:
        assert [job.next(20).token_ids[0] for _ in range(8)] == kv.tokens
    running.cancel()
    joined = seen.joined()
    assert sum(joined) == 6
    assert max(joined) <= 2, joined


def test_jobs_that_copy_nothing_all_join_in_one_gap(
    engine: DecodeEngine, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside a prompt that may use all of it: a burst of hand-offs would wait for many
    chunks."""
    monkeypatch.setattr(batch_module, "PREFILL_SECONDS", 1e-6)
    kv, seen = prefill(17), Seen(monkeypatch)
    running = LocalJob(engine, [30, 31], ENDLESS)
    running.next(20)
    long = LocalJob(engine, [30] * 4000, ENDLESS)
    assert eventually(lambda: engine.decoding == 2)
    seen.steps.clear()
    jobs = [LocalJob(engine, kv.prompt, GREEDY) for _ in range(6)]
    seen.steps.set()
    for job in jobs:
        assert [job.next(20).token_ids[0] for _ in range(8)] == kv.tokens
    with pytest.raises(queue.Empty):
        long.next(0)
    for one in (running, long):
        one.cancel()
    joined = seen.joined()
    assert sum(joined) == 6
    assert max(joined) >= 3, joined


def test_what_fails_beside_a_step_ends_its_jobs_and_not_the_engine(
    engine: DecodeEngine, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the thread would end, and the receiver would take sessions that nobody decodes."""
    monkeypatch.setattr("mlx_receiver.decode.engine._PROBE_SECONDS", 0.05)
    kv = prefill(17)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("of all things")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._gap, "work", fail)
        with pytest.raises(WireError, match="of all things"):
            generate_tokens(engine, kv.prompt, GREEDY)
    assert eventually(lambda: not engine.fault)
    assert generate_tokens(engine, kv.prompt, GREEDY) == kv.tokens


def test_a_batch_that_cannot_be_begun_anew_hangs_nobody(
    engine: DecodeEngine, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its jobs fail, and it is tried again until that works."""
    monkeypatch.setattr("mlx_receiver.decode.engine._PROBE_SECONDS", 0.05)
    kv, broken = prefill(17), threading.Event()
    make = Batch._make_generator

    def fail(*_: object) -> None:
        raise ZeroDivisionError("of all things")

    def make_none(self: Batch) -> Any:
        return fail() if broken.is_set() else make(self)

    monkeypatch.setattr(Batch, "_make_generator", make_none)
    broken.set()
    monkeypatch.setattr(engine._running.batch._generator, "next", fail)
    with pytest.raises(WireError, match="of all things"):
        generate_tokens(engine, kv.prompt, GREEDY)
    assert eventually(lambda: bool(engine.fault))
    with pytest.raises(WireError, match="cannot decode"):
        generate_tokens(engine, kv.prompt, GREEDY)
    broken.clear()
    assert eventually(lambda: not engine.fault)
    assert generate_tokens(engine, kv.prompt, GREEDY) == kv.tokens


def test_a_front_and_a_prompt_share_the_time_beside_a_text(
    tiny_llama_path: Path, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither has to wait for the other's end, and the text gets its tokens."""
    for module in (batch_module, fronts_module):
        monkeypatch.setattr(module, "LONGEST_CHUNK", 16, raising=False)
        monkeypatch.setattr(module, "_LONGEST_CHUNK", 16, raising=False)
    log: list[str] = []
    compute, step, hold = Fronts.compute, Batch.step, threading.Event()
    hold.set()

    def computed(self: Fronts, *args: Any) -> bool:
        done = compute(self, *args)
        log.extend(["front"] * done)
        return done

    def stepped(self: Batch, *share: float) -> Any:
        hold.wait()
        tokens = step(self, *share)
        log.extend(["token"] * bool(tokens) + ["prompt"] * bool(self.prefilled[0]))
        return tokens

    monkeypatch.setattr(Fronts, "compute", computed)
    monkeypatch.setattr(Batch, "step", stepped)
    text, kv, other = prefill(40, 300), prefill(600), prefill(601)
    with started(tiny_llama_path) as receiver, connected(receiver) as client:
        decoded = client.request(text, Sampling(max_tokens=300, temperature=0.0))
        steps = client.steps(decoded)
        tokens = [text.first, *next(steps).token_ids]
        hold.clear()  # they are all there when the next step begins
        session = client.open(kv.prompt, GREEDY, {"compute": "front"})
        assert isinstance(client.opened(session), Opened)
        job = LocalJob(receiver.engine, other.prompt, GREEDY)
        fronts = receiver.engine._gap.fronts
        try:
            assert eventually(lambda: len(fronts) == 1)
        finally:
            hold.set()
        assert [token for _ in range(8) for token in job.next(20).token_ids] == other.tokens
        client.complete(session)
        client.start(session, kv.first)
        assert [kv.first, *client.tokens(session)] == kv.tokens
        assert [*tokens, *(one for said in steps for one in said.token_ids)] == text.tokens
    both = [at for at, what in enumerate(log) if what == "front"]
    beside = log[both[0] : both[-1]]
    assert beside.count("prompt") >= 10 and beside.count("token") >= 10
