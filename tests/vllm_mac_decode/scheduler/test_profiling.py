"""vLLM measured while it is idle, in every order of events, without vLLM."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_receiver.planning import cached, review
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.profile import Coding, Decode, Prefill, Profile
from tests.vllm_mac_decode.engine import PROMPT, Engine, Port
from tests.vllm_mac_decode.plain import Output, Params, Request
from vllm_mac_decode.scheduler import profiling
from vllm_mac_decode.scheduler.port import EngineRules, Machine
from vllm_mac_decode.scheduler.profiling import Profiling
from vllm_mac_decode.scheduler.trials import STEP_SECONDS, Plan

#: As of a small GPU, and of a slow processor.
FAST = (Prefill(0.02, 1.7e-4, 6e-9, 8192), Decode(0.085, 2e-4, 2e-7))
SLOW = (Prefill(0.2, 5e-3, 1e-6, 2048), Decode(0.25, 1e-2, 1e-5))


def machine(chunk: int = 8192, rows: int = 64, max_tokens: int = 32768, **more: Any) -> Machine:
    key = {"hardware": "a GPU", "vllm": "0.32", **more}
    return Machine("a GPU", "m", key, chunk, rows, max_tokens, 1000, kv_bytes=1 << 30)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cached.CACHE_VARIABLE, str(tmp_path))


class Vllm:
    """An idle engine that computes trials, as long as ``speed`` says, on a clock of its own."""

    def __init__(
        self, speed: tuple[Prefill, Decode], of: Machine, enabled: bool = True, caches: bool = True
    ) -> None:
        self.prefill, self.decode = speed
        self.port = Port(idle=True)
        if not caches:
            self.port.prefixes = None
        self.profiling = Profiling(enabled)
        self.profiling.begin(of)
        self.now = 1000.0
        self.longest = 0.0
        self.ran = 0
        self.texts: set[tuple[int, ...]] = set()

    def rest(self) -> bool:
        """Ticks and rests of an idle vLLM; whether it has a trial then."""
        woken = self.port.woken
        self.profiling.look(self.port, self.now, True)  # type: ignore[arg-type]
        assert self.port.woken <= woken + 1
        self.profiling.work(self.port, self.now)  # type: ignore[arg-type]
        return bool(self.port.trials)

    def run(self, until: int = 1 << 30) -> None:
        """Compute what it has, ``until`` so many steps at the most."""
        trials, self.port.trials = self.port.trials, {}
        outputs = {name: output for name, (_, output) in trials.items()}
        new = context = 0
        for name, (tokens, _) in trials.items():
            self.profiling.added(name)
            held = self._cached(tokens)
            self.profiling.scheduled(name, held, self.now)
            new, context = new + len(tokens) - held, held
        took = self.prefill.seconds(new, context)
        for step in range(max(outputs.values())):
            if step == until:
                return
            self.now += took
            self.longest = max(self.longest, took)
            self.profiling.stepped(
                [(name, 1, step + 1 == count) for name, count in outputs.items()], self.now
            )
            tokens = next(iter(trials.values()))[0]
            took = self.decode.seconds(len(tokens) + step, len(trials))
        self.ran += 1
        self.texts |= {tuple(tokens) for tokens, _ in trials.values()}

    def _cached(self, tokens: list[int]) -> int:
        if self.port.prefixes is None:
            return 0
        ends = [len(t) for t in self.texts if tuple(tokens[: len(t)]) == t]
        return min(max(ends, default=0), len(tokens) - 1) // 16 * 16

    def measure(self) -> None:
        for _ in range(1000):
            if not self.rest():
                break
            self.run()
        else:
            raise AssertionError("it does not end")
        if self.profiling._thread is not None:
            self.profiling._thread.join()
        self.rest()


@pytest.mark.parametrize("speed", [FAST, SLOW])
@pytest.mark.parametrize("caches", [True, False])
def test_what_it_takes_is_found(speed: tuple[Prefill, Decode], caches: bool) -> None:
    vllm = Vllm(speed, machine(speed[0].chunk), caches=caches)
    began = vllm.now
    vllm.measure()
    profile = vllm.profiling.profile
    assert profile is not None and profile.source == "measured" and profile.kv_bytes == 1 << 30
    # The slow one's longest step has 32 tokens.
    for new, context in ((100, 0), (1000, 0), (1000, 3000)) if speed is FAST else ((60, 0),):
        wanted = speed[0].seconds(new, context)
        assert profile.prefill.seconds(new, context) == pytest.approx(wanted, rel=0.05)
    for context, rows in ((100, 1), (100, 4), (500, 2)) if speed is FAST else ((60, 1), (60, 4)):
        wanted = speed[1].seconds(context, rows)
        assert profile.decode.seconds(context, rows) == pytest.approx(wanted, rel=0.05)
    assert vllm.now - began < profiling.SECONDS
    assert vllm.longest < 2 * STEP_SECONDS, "nobody has to wait for long"
    assert vllm.profiling.saved is not None and vllm.profiling.saved.prefill_error < 0.01


def test_it_is_measured_once() -> None:
    Vllm(FAST, machine()).measure()
    again = Vllm(FAST, machine())
    assert not again.rest() and again.profiling.profile is not None
    other = Vllm(FAST, machine(vllm="0.33"))
    assert other.profiling.profile is None and other.rest()
    unasked = Vllm(FAST, machine(), enabled=False)
    assert unasked.profiling.profile is not None
    assert not Vllm(FAST, machine(vllm="0.31"), enabled=False).rest()


def test_how_fast_workers_quantise_is_part_of_it() -> None:
    told = Coding(2e9, 1e9, 2)
    vllm = Vllm(FAST, machine())
    vllm.profiling.begin(machine(), told)
    vllm.measure()
    assert vllm.profiling.profile is not None and vllm.profiling.profile.coding == told
    assert vllm.profiling.saved is not None and vllm.profiling.saved.profile.coding == told
    # They do it again at each start; nothing is said if they did not.
    again = Profiling(enabled=False)
    again.begin(machine())
    assert again.profile is not None and again.profile.coding == told
    faster = Coding(4e9, 1e9, 2)
    again.begin(machine(), faster)
    assert again.profile.coding == faster
    assert cached.read_all("vllm")[0].profile.coding == faster


@pytest.mark.parametrize("said", [Coding(), Coding(threads=2)])
def test_rates_that_no_worker_has_measured_at_this_start_stay(said: Coding) -> None:
    """With ``profile=false``, or where it failed: one worker or several."""
    told = Coding(2e9, 1e9, 2)
    vllm = Vllm(FAST, machine())
    vllm.profiling.begin(machine(), told)
    vllm.measure()
    again = Vllm(FAST, machine())
    again.profiling.begin(machine(), said)
    assert again.profiling.profile is not None and again.profiling.profile.coding == told
    assert cached.read_all("vllm")[0].profile.coding == told
    again.profiling._want()
    again.measure()
    assert again.ran and cached.read_all("vllm")[0].profile.coding == told


def test_a_file_that_says_nothing_of_quantising_is_read_and_completed(tmp_path: Path) -> None:
    Vllm(FAST, machine()).measure()
    (file,) = tmp_path.glob("profiles/*.json")
    old = json.loads(file.read_text())
    del old["profile"]["coding"]
    file.write_text(json.dumps(old))
    found = Profiling(enabled=False)
    found.begin(machine())
    assert found.profile is not None and found.profile.coding == Coding()
    found.begin(machine(), Coding(2e9, 1e9))
    assert json.loads(file.read_text())["profile"]["coding"]["q8"] == 2e9
    assert json.loads(file.read_text())["made"] == old["made"], "the rest is as old as it was"


@settings(deadline=None)
@given(
    st.sampled_from([FAST, SLOW]), st.integers(1, 40_000), st.integers(1, 8192), st.booleans(),
    st.integers(1, 64), st.data(),
)  # fmt: skip
def test_every_plan_ends(
    speed: tuple[Prefill, Decode], longest: int, chunk: int, grows: bool, rows: int,
    data: st.DataObject,
) -> None:  # fmt: skip
    """Whatever is skipped and however long it takes, and no text is longer than the model's."""
    plan = Plan(machine(chunk, rows, longest), grows)
    done = 0
    while (item := plan.next()) is not None:
        done += 1
        assert done < 100
        assert 1 <= item.tokens <= longest - item.output and 1 <= item.rows <= rows
        assert item.grown or item.tokens * item.rows <= max(chunk, 64)
        if data.draw(st.integers(0, 4)) == 0:
            plan.skip()
        else:
            plan.done(data.draw(st.floats(0.1, 3)) * speed[0].seconds(item.tokens))


def test_a_request_ends_the_trial_and_it_goes_on_later() -> None:
    vllm = Vllm(FAST, machine())
    rng = random.Random(3)
    for n in range(30):
        if not vllm.rest():
            break
        (*ids,) = vllm.port.trials
        if n % 3 == 0:
            if n % 2:
                vllm.run(until=rng.randrange(2))
            ended = vllm.profiling._asked is None
            vllm.port.trials = {}
            vllm.profiling.busy(vllm.port, vllm.now)  # type: ignore[arg-type]
            if not ended:
                assert set(vllm.port.withdrawn) >= set(ids)
            # What it has brought until it is gone is nobody's either.
            vllm.profiling.stepped([(name, 1, False) for name in ids], vllm.now)
            vllm.profiling.gone(ids[0], vllm.port, vllm.now)  # type: ignore[arg-type]
            assert not vllm.rest(), "not while there is somebody"
            vllm.now += 1.0
            assert not vllm.rest(), "nor soon after"
            vllm.now += profiling._QUIET_SECONDS
        else:
            vllm.run()
    vllm.measure()
    profile = vllm.profiling.profile
    assert profile is not None
    assert profile.prefill.seconds(1000) == pytest.approx(FAST[0].seconds(1000), rel=0.05)


def test_under_constant_load_it_is_given_up() -> None:
    vllm = Vllm(FAST, machine())
    for _ in range(profiling._MOST_FAILED + 1):
        assert vllm.rest()
        vllm.port.trials = {}
        vllm.profiling.busy(vllm.port, vllm.now)  # type: ignore[arg-type]
        vllm.now += 10
    assert not vllm.rest() and vllm.profiling.profile is None
    assert not vllm.profiling._wanted


def test_somebodys_output_keeps_it_from_beginning() -> None:
    vllm = Vllm(FAST, machine())
    vllm.profiling.stepped([("a", 1, True)], vllm.now)
    assert not vllm.rest()
    vllm.now += profiling._QUIET_SECONDS
    assert vllm.rest()


def test_nothing_without_room_without_idleness_without_a_receiver() -> None:
    vllm = Vllm(FAST, machine())
    assert vllm.port.prefixes is not None
    vllm.port.idle = False
    assert not vllm.rest() and not vllm.port.woken
    vllm.port.idle = True
    vllm.profiling.look(vllm.port, vllm.now, False)  # type: ignore[arg-type]
    vllm.profiling.work(vllm.port, vllm.now)  # type: ignore[arg-type]
    assert not vllm.port.trials and not vllm.port.woken
    vllm.port.prefixes.free = 0.2
    assert not vllm.rest() and vllm.profiling.profile is None


def test_an_engine_that_generates_nothing_gets_no_trial() -> None:
    vllm = Vllm(FAST, machine())
    vllm.port.rules = EngineRules(everything="pooling")
    assert not vllm.rest() and not vllm.profiling._wanted


def test_what_vllm_leaves_in_its_queue_is_taken_back() -> None:
    vllm = Vllm(FAST, machine())
    assert vllm.rest()
    (name,) = vllm.port.trials
    vllm.now += 1.5
    vllm.port.trials = {}
    vllm.profiling.look(vllm.port, vllm.now, True)  # type: ignore[arg-type]
    assert vllm.port.withdrawn == [name]


def test_a_profile_that_requests_contradict_is_measured_again() -> None:
    vllm = Vllm(FAST, machine())
    vllm.measure()
    estimate = vllm.profiling.estimate
    for n in range(40):
        estimate.observe_decode(500, 1, 5 * FAST[1].seconds(500), float(n))
    assert estimate.distrusted
    vllm.decode = Decode(0.5, 0.0, 1e-6)
    vllm.measure()
    assert estimate.profile is not None
    assert estimate.profile.decode.seconds(500) == pytest.approx(vllm.decode.seconds(500), rel=0.1)
    for n in range(40):
        estimate.observe_decode(500, 1, 0.01, float(n))
    assert estimate.distrusted and not vllm.rest(), "but not all the time"


def test_a_profile_is_measured_once_more_for_what_nothing_contradicts() -> None:
    """A GPU that had other work then: everything is handed off, and nothing of vLLM's own tells how
    fast it decodes."""
    busy = (FAST[0], Decode(1.0, 0.0, 0.0))
    vllm = Vllm(busy, machine())
    vllm.measure()
    vllm.decode = FAST[1]
    vllm.now += review.SECONDS[0] / 2
    assert not vllm.rest()
    vllm.now += review.SECONDS[0]
    vllm.measure()
    profile = vllm.profiling.profile
    assert profile is not None
    assert profile.decode.seconds(500) == pytest.approx(FAST[1].seconds(500), rel=0.1)
    kept = cached.read("vllm", machine().key)
    assert kept is not None and kept.profile.decode == profile.decode
    pauses = []
    for _ in range(8):
        began = vllm.now
        while not vllm.rest():
            vllm.now += review.SECONDS[0] / 8
        pauses.append((vllm.now - began) / review.SECONDS[0])
        vllm.measure()
    assert pauses == sorted(pauses) and pauses[0] <= 1.2 and pauses[-1] == pytest.approx(24, 0.1)


def test_what_there_was_no_time_to_measure_is_tried_again() -> None:
    vllm = Vllm(FAST, machine())
    for _ in range(profiling._MOST_FAILED + 1):
        vllm.rest()
        vllm.port.trials = {}
        vllm.profiling.busy(vllm.port, vllm.now)  # type: ignore[arg-type]
        vllm.now += 10
    for _ in range(2):
        assert not vllm.rest()
        vllm.now += review.SECONDS[0] + 1
    vllm.measure()
    assert vllm.profiling.profile is not None


def test_where_nothing_is_to_be_measured_it_stays_so() -> None:
    for enabled, everything in ((True, "pooling"), (False, None)):
        vllm = Vllm(FAST, machine(), enabled=enabled)
        vllm.port.rules = EngineRules(everything=everything)
        for _ in range(4):
            assert not vllm.rest() and not vllm.profiling._wanted
            vllm.now += review.SECONDS[1]


# --- through the relay --------------------------------------------------------------------------


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    engine.port.idle = True
    engine.receiver.proven = True
    engine.relay.profiling.begin(machine(max_tokens=64, chunk=64))
    engine.relay.profiling._busy_at = -1000.0
    yield engine


def begin(engine: Engine) -> Request:
    """vLLM is given the next trial."""
    engine.receiver.tick(time.monotonic())
    assert engine.port.woken
    engine.relay.rest()
    ((name, (tokens, output)),) = list(engine.port.trials.items())[-1:]
    request = Request(name, tokens, Params(output))
    engine.relay.on_new_request(request)  # type: ignore[arg-type]
    return request


def test_a_trial_is_nobodys(engine: Engine) -> None:
    """It is not handed off, nobody hears of it, and no number tells of it."""
    trial = begin(engine)
    assert engine.relay.scheduled(trial.request_id) is None
    went = engine.put_out(Output(trial.request_id, [5], "length"))
    assert went.outputs == [] and engine.port.out == [] and engine.link.said == []
    assert went.scheduler_stats is not None and went.scheduler_stats.num_running_reqs == 0
    assert not engine.relay._sessions and not engine.counts().local
    assert engine.port.prefixes is not None
    assert engine.port.prefixes.discounted == [(1, trial.num_prompt_tokens, 0)]


def test_steps_that_contradict_the_profile_have_it_measured_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what a request of vLLM's own shows to a trial, once it rests."""
    clock = [time.monotonic()]
    monkeypatch.setattr("vllm_mac_decode.scheduler.relay.time.monotonic", lambda: clock[0])
    profiling = engine.relay.profiling
    profiling.estimate.measured(Profile("v", "m", *FAST))
    profiling._wanted = False

    def text(times: float) -> None:
        engine.receiver.proven = False  # so that it is vLLM's own
        engine.add("own", max_tokens=1000)
        engine.receiver.proven = True
        engine.relay.scheduled("own")
        for position in range(50):
            clock[0] += times * FAST[1].seconds(len(PROMPT) + position)
            engine.step("own", finished=position == 49)
        clock[0] += 3.0
        engine.relay.tick(clock[0])

    text(1.0)
    assert not profiling.estimate.distrusted and not engine.port.woken, "it is as it was measured"
    text(5.0)
    assert engine.port.woken
    engine.relay.rest()
    assert len(engine.port.trials) == 1


def test_a_request_is_handed_off_beside_a_trial(engine: Engine) -> None:
    trial = begin(engine)
    engine.relay.scheduled(trial.request_id)
    number = engine.started()
    assert engine.port.withdrawn == [trial.request_id]
    went = engine.put_out(Output(trial.request_id, [5], "length"))
    assert went.outputs == []
    engine.relay.aborted(trial.request_id)
    engine.decode(number, 1, 8)
    assert engine.tokens() == [7, 8]


def test_a_cache_reset_ends_it(engine: Engine) -> None:
    trial = begin(engine)
    assert engine.relay.cache_reset() == [trial.request_id]
    assert engine.relay.cache_reset() == []


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_events(engine: Engine, seed: int) -> None:
    """Whatever happens to trials and beside them, nobody hears of one, and requests get theirs."""
    rng, trials, requests = random.Random(seed), [], 0
    for n in range(150):
        match rng.randrange(8):
            case 0:
                engine.relay.profiling._busy_at = -1000.0
                engine.receiver.tick(time.monotonic() + rng.choice([0, 2, 40]))
            case 1:
                engine.relay.rest()
            case 2 if engine.port.trials:
                name, (tokens, output) = engine.port.trials.popitem()
                trials.append(name)
                trial = Request(name, tokens, Params(output))
                engine.relay.on_new_request(trial)  # type: ignore[arg-type]
            case 3 if trials:
                engine.relay.scheduled(rng.choice(trials), rng.randrange(9))
            case 4 if trials:
                ends = rng.choice([None, "length", "abort"])
                assert engine.put_out(Output(rng.choice(trials), [1], ends)).outputs == []
            case 5 if trials:
                name = trials.pop(rng.randrange(len(trials)))
                rng.choice([engine.relay.aborted, engine.relay.preempted])(name)
            case 6:
                for name in engine.relay.cache_reset():
                    engine.relay.aborted(name)
            case 7:
                requests += 1
                number = engine.started(f"r{n}", max_tokens=2)
                engine.decode(number, 1, 8, finish="length")
                assert engine.tokens(f"r{n}") == [7, 8]
    assert {name for name, *_ in engine.port.out} == set(engine.requests)
    assert len(engine.requests) == requests and engine.relay.profiling.used


def test_a_broken_engine_keeps_nobody_from_anything(engine: Engine) -> None:
    def fail(*_: Any) -> None:
        raise AttributeError("another vLLM")

    engine.port.trial = fail  # type: ignore[method-assign]
    engine.receiver.tick(time.monotonic())
    engine.relay.rest()
    engine.relay.rest()
    assert engine.started()


def test_what_the_receiver_says_of_its_speed(engine: Engine) -> None:
    profile = Profile("a Mac", "m", *FAST)
    assert engine.receiver.speed.profile is None
    engine.say(m.Status(0, 0, True, 0, [], profile=profile))
    engine.say(m.Status(0, 0, True, 0, []))
    assert engine.receiver.speed.profile == profile
    engine.lose()
    assert engine.receiver.speed.profile is None
