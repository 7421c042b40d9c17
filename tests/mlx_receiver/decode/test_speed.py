"""How fast the receiver is: measured beside nobody, kept, told, and corrected."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

from mlx_receiver.caches.memory import Budget
from mlx_receiver.decode import measuring, speed
from mlx_receiver.decode.batch import Batch
from mlx_receiver.decode.fronts import Fronts
from mlx_receiver.decode.gap import Gap
from mlx_receiver.decode.jobs import Job
from mlx_receiver.decode.measuring import Measurement
from mlx_receiver.decode.model import find_model, load_model
from mlx_receiver.decode.speed import Speed, Watch
from mlx_receiver.planning import cached, review
from mlx_receiver.planning.live import Estimate
from mlx_receiver.receiver import Receiver
from mlx_receiver.wire.messages import Opened, Status, Welcome, WireError
from mlx_receiver.wire.profile import Decode, Prefill, Profile
from mlx_receiver.wire.sampling import Sampling
from tests.mlx_receiver.client import FakeVllm, Prefilled, connected, started
from tests.waiting import eventually

PROFILE = Profile("here", "m", Prefill(0.01, 2e-4, 1e-8, 2048), Decode(0.02, 1e-3, 1e-7))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cached.CACHE_VARIABLE, str(tmp_path))
    # Tests run beside one another.
    monkeypatch.setattr(cached, "MOST_ERROR", 100.0)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_GROWN", 512)
    monkeypatch.setattr(measuring, "_BATCHES", ((32, 1), (64, 2), (128, 4)))


def measured(receiver: Receiver) -> Profile:
    assert receiver.speed is not None and receiver.speed.finished.wait(60)
    assert receiver.speed.profile is not None
    return receiver.speed.profile


def room(loaded: Any, spare: int = 1 << 30) -> Budget:
    budget = Budget()
    budget.configure(loaded.cache, spare)
    return budget


def in_step(loaded: Any, source: Any, spare: int = 1 << 30, **options: Any) -> Measurement:
    return Measurement(source, loaded, 4, room(loaded, spare), **options)


@pytest.fixture
def own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is this process's computing, whatever the machine does beside it."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)


@pytest.fixture(scope="module")
def llama(tiny_llama_path: Path) -> Any:
    source = find_model(str(tiny_llama_path))
    return load_model(source), source


@pytest.mark.usefixtures("own_time")
def test_what_is_measured_is_what_forwards_take(llama: Any) -> None:
    measurement = in_step(*llama)
    shares = []
    while measurement.advance():
        shares.append(measurement.share)
    found = measurement.result()
    assert found is not None and 0 < found.seconds < 20
    assert shares == sorted(shares) and shares[-1] <= 1
    profile = found.profile
    assert found.prefill_error < 0.5 and found.decode_error < 0.5
    assert 16 <= profile.prefill.chunk <= 2048
    # A prefill is faster than decoding the same tokens one by one, more rows than one step a row.
    assert profile.prefill.seconds(512) < profile.decode.text(256, 512)
    assert profile.decode.seconds(64, 4) < 4 * profile.decode.seconds(64, 1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(profile), type=Profile) == profile


@pytest.mark.usefixtures("own_time")
@pytest.mark.parametrize("every", [1, 3, 30])
def test_whoever_comes_can_have_the_thread_after_any_forward(llama: Any, every: int) -> None:
    """It gives way after every so many forwards, goes on later, and ends."""
    measurement = in_step(*llama, seconds=3.0)
    forwards = 0
    while measurement.advance():
        forwards += 1
        assert forwards < 20_000
        if forwards % every == 0:
            measurement.give_way()
            assert measurement._forwards is None
    if every == 30:
        assert measurement.result() is not None
    assert measurement.seconds < 2 * 3.0 + 1


def test_without_room_nothing_is_measured(llama: Any) -> None:
    measurement = in_step(*llama, spare=1000)
    while measurement.advance():
        pass
    assert measurement.result() is None


@pytest.mark.parametrize("every", [0, 1, 3])
def test_its_memory_is_reserved_and_given_back(llama: Any, every: int) -> None:
    """All that its caches take, as long as they exist."""
    loaded, source = llama
    budget, before = room(loaded), mx.get_active_memory()
    measurement, seen = Measurement(source, loaded, 4, budget, seconds=3.0), []
    while measurement.advance():
        seen.append(budget.reserved)
        held = mx.get_active_memory() - before
        assert held <= budget.reserved + (4 << 20), "what else a forward leaves is small"
        if every and len(seen) % every == 0:
            measurement.give_way()
            assert budget.reserved == 0
    assert all(seen) and budget.reserved == 0
    if not every:
        assert len(set(seen)) > 2, "no more than each needs"


@pytest.mark.parametrize("at", range(0, 12, 3))
def test_its_memory_is_given_back_when_it_fails(
    llama: Any, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, source = llama
    budget = room(loaded)
    found = Speed(source, loaded, budget, 4)
    for _ in range(at):
        found.forward()

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(mx, "eval", fail)
    monkeypatch.setattr(Batch, "step", fail)
    for _ in range(20):  # not every forward calls one of them
        if found.wanted:
            found.forward()
    assert not found.wanted and budget.reserved == 0


class Kept:
    """What texts left, that would make room."""

    nbytes = 1 << 30

    def reclaim(self) -> bool:
        raise AssertionError("somebody may use it")


@pytest.mark.parametrize(("rows", "batches"), [(0, 0), (1, 0), (2, 1), (4, 2), (8, 3)])
def test_what_is_kept_makes_no_room_for_it(llama: Any, rows: int, batches: int) -> None:
    """It is measured in what is free, and less of it where that is little."""
    loaded, source = llama
    budget = room(loaded)
    budget.total = Kept.nbytes + 4 * rows * budget.kv_bytes(200)
    assert budget.add(Kept.nbytes)
    budget.kept = Kept()
    measurement = Measurement(source, loaded, 4, budget)
    while measurement.advance():
        pass
    assert len(measurement._decodes) == batches
    assert budget.reserved == Kept.nbytes


def test_who_lacks_memory_for_it_gets_that_next_time(llama: Any) -> None:
    """A session that does not fit beside it: it gives way, and goes on when it is quiet again."""
    loaded, source = llama
    budget, gap = room(loaded, 1 << 24), Gap(source)
    found = gap.speed = Speed(source, loaded, budget, 4)
    found.forward()
    assert budget.reserved
    tokens = (1 << 24) // loaded.cache.layout.bytes_per_token - 300
    with pytest.raises(WireError, match="KV memory"):
        budget.reserve(tokens, 1)
    gap.begin(False)
    assert not found.due and found.wanted
    budget.reserve(tokens, 1).release()
    gap.begin(False)
    found._not_before = 0.0
    while found.due:
        found.forward()
    assert budget.reserved == 0
    found.close()
    with pytest.raises(WireError):
        budget.reserve(1 << 24, 1)


def test_it_ends_while_somebody_lacks_memory(llama: Any) -> None:
    """The decoding thread gives the model up between any two steps of another one."""
    loaded, source = llama
    told: list[bool] = []

    class Ending(Budget):
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name == "short" and value is not None and told:
                self.short = None
            return value

    budget = Ending()
    budget.configure(loaded.cache, 1 << 20)
    Speed(source, loaded, budget, 4)
    told.append(True)
    with pytest.raises(WireError, match="KV memory"):
        budget.reserve(1 << 20, 1)


def test_a_request_does_not_wait_for_it(
    tiny_llama_path: Path, prefill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions that open all along the measurement get the tokens they always get, before it is
    over."""
    kv: Prefilled = prefill(40, 6)
    advance, served = Measurement.advance, 0

    def slowly(self: Measurement) -> bool:
        time.sleep(0.05)
        return advance(self)

    monkeypatch.setattr(Measurement, "advance", slowly)
    with started(tiny_llama_path, profile=True) as receiver, connected(receiver) as client:
        assert receiver.speed is not None
        while not receiver.speed.finished.wait(0.1) and served < 5:
            session = client.request(kv, Sampling(max_tokens=6, temperature=0.0))
            assert client.tokens(session) == kv.tokens[1:]
            # It goes on when nobody has come for a while, not at once.
            served += not receiver.speed.finished.is_set()
            time.sleep(speed._QUIET_SECONDS)
        profile = measured(receiver)
        assert profile.kv_bytes == receiver.store.budget_bytes
    assert served


def test_it_is_measured_once(tiny_llama_path: Path) -> None:
    with started(tiny_llama_path, profile=True) as receiver:
        profile = measured(receiver)
    assert len(cached.read_all("receiver")) == 1
    with started(tiny_llama_path, profile=True, kv_memory=1 << 27) as receiver:
        assert receiver.speed is not None and not receiver.speed.wanted
        again = receiver.speed.profile
        assert again == msgspec.structs.replace(profile, kv_bytes=1 << 27)
        with connected_and_told(receiver) as (_, welcome):
            assert welcome.profile == again
    with started(tiny_llama_path, profile=True, dtype="bfloat16") as receiver:
        assert receiver.speed is not None and receiver.speed.wanted, "another dtype is another one"


def test_a_profile_that_keeps_requests_away_is_measured_again(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that had other work for so long that what it measured fits: vLLM keeps everything,
    nothing is decoded, and the file says so for ever."""
    with started(tiny_llama_path, profile=True) as receiver:
        measured(receiver)
        here = receiver.speed
        assert here is not None and here.saved is not None
        slow = msgspec.structs.replace(here.saved.profile, decode=Decode(10.0, 0.0, 0.0))
        cached.write(msgspec.structs.replace(here.saved, profile=slow))
    monkeypatch.setattr(review, "SECONDS", (0.5, 3600.0))
    with started(tiny_llama_path, profile=True) as receiver, connected(receiver) as client:
        here = receiver.speed
        assert here is not None
        told = client.wait(
            lambda m: isinstance(m, Status) and m.profile is not None
            and m.profile.decode.step < 1
        )  # fmt: skip
        assert told.profile == here.profile
        (kept,) = cached.read_all("receiver")
        assert kept.profile.decode == told.profile.decode


def test_a_receiver_that_has_stopped_holds_no_weights(tiny_llama_path: Path) -> None:
    """Another model may be loaded next, and the memory may be for one."""
    with started(tiny_llama_path, profile=True) as receiver:
        measured(receiver)
    assert eventually(lambda: receiver.engine.loaded is None)
    assert receiver.speed is not None and receiver.speed._loaded is None


def test_without_profile_nothing_is_measured(tiny_llama_path: Path) -> None:
    with started(tiny_llama_path) as receiver:
        assert receiver.speed is not None and not receiver.speed.wanted
        with connected_and_told(receiver) as (_, welcome):
            assert welcome.profile is None


def test_vllm_hears_of_what_is_measured_later(tiny_llama_path: Path) -> None:
    with started(tiny_llama_path, profile=True) as receiver:
        with connected_and_told(receiver) as (client, welcome):
            assert welcome.profile is None
            profile = measured(receiver)
            status = client.wait(lambda m: isinstance(m, Status) and m.profile is not None)
            assert status.profile == profile
            assert client.wait(lambda m: isinstance(m, Status)).profile is None, "once"


def test_what_cannot_be_measured_is_no_reason_not_to_decode(
    tiny_llama_path: Path, prefill: Any, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fail(_self: Measurement) -> bool:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Measurement, "advance", fail)
    kv = prefill(20, 4)
    with started(tiny_llama_path, profile=True) as receiver, connected(receiver) as client:
        assert receiver.speed is not None and receiver.speed.finished.wait(20)
        session = client.request(kv, Sampling(max_tokens=4, temperature=0.0))
        assert client.tokens(session) == kv.tokens[1:]
        assert receiver.speed.profile is None and not receiver.speed.wanted
    assert caplog.text.count("could not be measured") == 1


class connected_and_told:
    """A client, and the Welcome that it got."""

    def __init__(self, receiver: Receiver) -> None:
        self._client = FakeVllm(receiver)

    def __enter__(self) -> tuple[FakeVllm, Welcome]:
        welcome = self._client.hello()
        assert isinstance(welcome, Welcome)
        return self._client, welcome

    def __exit__(self, *_: object) -> None:
        self._client.close()


# --- what steps say -----------------------------------------------------------------------------


def job(prompt: int, prefills: bool = False) -> Job:
    made = Job([1] * prompt, Sampling(max_tokens=8), None)  # type: ignore[arg-type]
    made.prefills, made.outputs = prefills, 1
    return made


class Noted(Estimate):
    def __init__(self) -> None:
        super().__init__(PROFILE)
        self.prefills: list[tuple[int, int, float]] = []
        self.decodes: list[tuple[int, int, float]] = []

    def observe_prefill(self, new: int, context: int, seconds: float, now: Any = None) -> None:
        self.prefills.append((new, context, seconds))

    def observe_decode(self, context: int, rows: int, seconds: float, now: Any = None) -> None:
        self.decodes.append((context, rows, round(seconds, 6)))


@pytest.fixture
def noted() -> Noted:
    return Noted()


@pytest.fixture
def watch(noted: Noted) -> Watch:
    return Watch(noted, threading.Lock())


def test_steps_of_the_same_texts_in_a_row(noted: Noted, watch: Watch) -> None:
    a, b = job(99), job(199)
    watch.stepped([a], (0, 0.0), [a], 1.0)
    watch.stepped([a], (0, 0.0), [a], 1.1)
    assert noted.decodes == [(100, 1, 0.1)]
    watch.stepped([a, b], (0, 0.0), [a], 1.3)
    watch.stepped([a, b], (0, 0.0), [a, b], 1.5)
    assert len(noted.decodes) == 1, "one has joined"
    watch.stepped([a, b], (0, 0.0), [a, b], 1.7)
    assert noted.decodes[1:] == [(150, 2, 0.2)]
    watch.stepped([b], (0, 0.0), [b], 1.8)
    assert len(noted.decodes) == 2, "one has left"


def test_a_prompt_that_is_prefilled_alone(noted: Noted, watch: Watch) -> None:
    a, b = job(1000, True), job(1000, True)
    a.held = 300
    watch.stepped([a], (100, 0.2), [], 1.0)
    watch.stepped([a], (200, 0.3), [], 1.3)
    assert noted.prefills == [(100, 300, 0.2), (200, 400, 0.3)]
    watch.stepped([a, b], (200, 0.4), [], 1.7)
    watch.stepped([b], (100, 0.1), [], 1.8)
    assert len(noted.prefills) == 2, "where it is nobody has seen"
    c, d = job(500, True), job(50)
    watch.stepped([d, c], (100, 0.1), [d], 2.0)
    watch.stepped([c], (100, 0.1), [], 2.1)
    assert noted.prefills[2:] == [(100, 100, 0.1)], "beside a step it takes longer"
    watch.stepped([d], (0, 0.0), [d], 2.2)
    watch.stepped([d], (0, 0.0), [d], 2.3)
    assert noted.decodes == [(51, 1, 0.1)]


def test_what_else_is_computed_between_steps_is_none_of_them(noted: Noted, watch: Watch) -> None:
    a = job(99)
    watch.stepped([a], (0, 0.0), [a], 1.0)
    watch.interrupted()
    watch.stepped([a], (0, 0.0), [a], 1.5)
    assert not noted.decodes
    watch.stepped([a], (0, 0.0), [a], 1.6)
    assert noted.decodes == [(100, 1, 0.1)]


def test_a_front_beside_a_text_makes_no_step_slower(
    tiny_llama_path: Path, prefill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chunks are computed between the steps of what is decoded, which say nothing then."""
    kv, happened = prefill(40, 300), []
    compute, stepped = Fronts.compute, speed.Speed.stepped

    def noted(self: Fronts, loaded: Any, rows: int, seconds: float) -> bool:
        computed = compute(self, loaded, rows, seconds)
        happened.append("front" if rows and computed else "")
        return computed

    def step(self: Any, *args: Any) -> None:
        happened.append("step")
        stepped(self, *args)

    monkeypatch.setattr(Fronts, "compute", noted)
    monkeypatch.setattr(speed.Speed, "stepped", step)
    monkeypatch.setattr(Estimate, "observe_decode", lambda *_: happened.append("observed"))
    with started(tiny_llama_path) as receiver, connected(receiver) as client:
        assert receiver.speed is not None
        receiver.speed._estimate.measured(PROFILE)
        sampling = Sampling(max_tokens=300, temperature=0.0)
        decoded = client.request(kv, sampling)
        session = client.open(kv.prompt * 10, sampling, {"compute": "front"})
        assert isinstance(client.opened(session), Opened)
        assert client.tokens(decoded) == kv.tokens[1:]
    beside = [happened[at + 1 : at + 3] for at, what in enumerate(happened) if what == "front"]
    assert ["step", "step"] in beside and "observed" in happened
    assert ["step", "observed"] not in beside


def test_real_steps_correct_a_profile(tiny_llama_path: Path, prefill: Any) -> None:
    """A profile that is far off comes near to what steps take."""
    kv = prefill(40, 60)
    with started(tiny_llama_path) as receiver, connected(receiver) as client:
        slow = msgspec.structs.replace(PROFILE, decode=Decode(1.0, 0.0, 0.0))
        assert receiver.speed is not None
        receiver.speed._estimate.measured(slow)
        session = client.open(kv.prompt, Sampling(max_tokens=60, temperature=0.0))
        assert isinstance(client.opened(session), Opened)
        client.send_kv(session, kv)
        client.start(session, kv.first)
        assert client.tokens(session) == kv.tokens[1:]
        profile = receiver.speed.profile
        assert profile is not None and profile.source == "live"
        assert profile.decode.seconds(60) < 0.5
        assert receiver.speed.error(0.5, "decode") < 1.0
        status = client.wait(lambda m: isinstance(m, Status) and m.profile is not None)
        assert status.profile.source == "live"


def test_a_profile_that_is_contradicted_is_measured_again_and_told(
    tiny_llama_path: Path, prefill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what is decoded; not before it rests."""
    monkeypatch.setattr(speed, "_QUIET_SECONDS", 0.2)
    kv = prefill(40, 60)
    with started(tiny_llama_path) as receiver, connected(receiver) as client:
        here = receiver.speed
        assert here is not None and not here.wanted
        here._measures = True
        slow = msgspec.structs.replace(PROFILE, decode=Decode(10.0, 0.0, 0.0))
        here._estimate.measured(slow)
        session = client.open(kv.prompt, Sampling(max_tokens=60, temperature=0.0))
        assert isinstance(client.opened(session), Opened)
        client.send_kv(session, kv)
        client.start(session, kv.first)
        assert client.tokens(session) == kv.tokens[1:]
        assert eventually(lambda: here.saved is not None, 60), "it was measured"
        profile = measured(receiver)
        assert profile.source == "measured" and profile.decode.seconds(60) < 0.5
        assert not here._estimate.distrusted
        told = client.wait(
            lambda m: isinstance(m, Status) and m.profile is not None
            and m.profile.source == "measured"
        )  # fmt: skip
        assert told.profile == profile
        here._estimate.measured(slow)
        session = client.request(kv, Sampling(max_tokens=60, temperature=0.0))
        assert client.tokens(session) == kv.tokens[1:]
        assert here._estimate.distrusted and not here.wanted, "but not all the time"
