"""The decode engine by itself: what joins copy, what fails, what waits."""

from __future__ import annotations

import io
import queue
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from prometheus_client import generate_latest

from mlx_receiver.caches.plain import PlainKV, PlainKVBuffers
from mlx_receiver.decode.batch import Float32Logits
from mlx_receiver.decode.engine import DecodeEngine
from mlx_receiver.decode.jobs import Job, Output
from mlx_receiver.decode.local import LocalJob, generate_tokens
from mlx_receiver.decode.model import ModelError, Progress, find_model
from mlx_receiver.decode.warmup import WARM_UP_JOBS
from mlx_receiver.metrics import Metrics
from mlx_receiver.wire.layout import LayerLayout
from mlx_receiver.wire.messages import WireError
from mlx_receiver.wire.sampling import Sampling
from tests.mlx_receiver.conftest import Prefill

GREEDY = Sampling(max_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def engine(tiny_llama_path: Path) -> Iterator[DecodeEngine]:
    engine = DecodeEngine(find_model(str(tiny_llama_path)), max_batch=3)
    engine.start()
    engine.wait_loaded()
    yield engine
    engine.stop()


class Collector:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        self.failures: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()

    def decoded(self, outputs: list[Output]) -> None:
        for output in outputs:
            self.outputs.put(output)

    def failed(self, job: Job, code: str, reason: str) -> None:
        self.failures.put((code, reason))

    def tokens(self) -> list[int]:
        tokens = []
        while True:
            output = self.outputs.get(timeout=20)
            tokens += output.token_ids
            if output.finish:
                return tokens


def handed_over(engine: DecodeEngine, prompt: list[int], planes: Any, capacity: int) -> Any:
    assert engine.loaded is not None
    cache = engine.loaded.cache
    buffers = cache.allocate(cache.layout, len(prompt), capacity)
    while buffers.grow():
        pass
    for layer, pair in enumerate(planes):
        for plane, data in enumerate(pair):
            buffers.part(layer, plane)[:, : len(prompt)] = data
    return buffers


def test_joining_an_empty_batch_copies_nothing(engine: DecodeEngine) -> None:
    tokens = 8192 - 64
    prompt = [30] * tokens
    layers = engine.source.layout.layers
    keys = layers[0].parts[0]
    one = np.full((keys.heads, tokens, keys.width), 0x3C000000, np.uint32)
    buffers = handed_over(engine, prompt, [[one, one]] * len(layers), 64)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    sink = Collector()
    engine.submit(Job(prompt, GREEDY, sink, 30, buffers.build))
    assert len(sink.tokens()) == 7
    # Anything copied whole would be at least one layer's keys.
    grown = mx.get_peak_memory() - before
    assert grown < one.nbytes, (grown, one.nbytes)


def test_a_cache_that_cannot_be_built_fails_its_job_only(
    engine: DecodeEngine, prefill: Prefill
) -> None:
    kv = prefill(17)

    def broken() -> list[Any]:
        raise RuntimeError("no memory left")

    sink = Collector()
    neighbour = LocalJob(engine, kv.prompt, GREEDY)
    engine.submit(Job(kv.prompt, GREEDY, sink, kv.first, broken))
    code, reason = sink.failures.get(timeout=10)
    assert code == "internal"
    assert "no memory left" in reason
    assert [neighbour.next(10).token_ids[0] for _ in range(8)] == kv.tokens


def test_joining_and_leaving_leave_no_work_for_the_next_step(
    engine: DecodeEngine, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's tokens would be shown only with the following step's."""
    before: set[str] = set()
    forward = Float32Logits.__call__

    def watched(self: Float32Logits, inputs: mx.array, cache: Any = None) -> Any:
        # A chunk of a prompt is a slice of it; how long chunks are, the machine's speed decides.
        if inputs.shape[1] == 1:
            graph = io.StringIO()
            mx.export_to_dot(graph, inputs)
            before.update(re.findall(r'label ="(\w+)"', graph.getvalue()))
        return forward(self, inputs, cache)

    monkeypatch.setattr(Float32Logits, "__call__", watched)
    kvs = [prefill(tokens) for tokens in (17, 2, 255)]
    running = LocalJob(engine, kvs[0].prompt, Sampling(max_tokens=40, temperature=0.0))
    running.next(20)
    for kv in kvs[1:]:
        assert generate_tokens(engine, kv.prompt, GREEDY) == kv.tokens
    running.cancel()
    assert generate_tokens(engine, kvs[0].prompt, GREEDY) == kvs[0].tokens
    assert before == {"ExpandDims"}


def test_a_failing_step_ends_its_jobs_and_not_the_engine(
    engine: DecodeEngine, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = prefill(17)

    def explode() -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._running.batch._generator, "next", explode)
    with pytest.raises(WireError, match="a decode step failed: out of memory"):
        generate_tokens(engine, kv.prompt, GREEDY)
    assert generate_tokens(engine, kv.prompt, GREEDY) == kv.tokens


def test_a_failing_sink_ends_its_own_jobs(engine: DecodeEngine, prefill: Prefill) -> None:
    kv = prefill(17)

    class Broken(Collector):
        def decoded(self, outputs: list[Output]) -> None:
            raise RuntimeError("nobody listens")

    engine.submit(Job(kv.prompt, GREEDY, Broken()))
    assert generate_tokens(engine, kv.prompt, GREEDY) == kv.tokens


def test_more_jobs_than_the_batch_holds_wait_their_turn(
    engine: DecodeEngine, prefill: Prefill
) -> None:
    kvs = [prefill(tokens) for tokens in (17, 2, 255, 17, 2, 17, 2)]
    jobs = [LocalJob(engine, kv.prompt, GREEDY) for kv in kvs]
    assert engine.decoding + engine.waiting <= len(jobs)
    for kv, job in zip(kvs, jobs, strict=True):
        assert [job.next(20).token_ids[0] for _ in range(8)] == kv.tokens


def test_a_row_that_would_pad_the_batch_too_far_waits(
    engine: DecodeEngine, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Room for one row of 255 tokens, and for several of 17.
    running = engine._running
    monkeypatch.setattr(running, "batch_bytes", 300 * running.batch.bytes_per_token)
    small, large = prefill(17), prefill(255)
    jobs = [LocalJob(engine, kv.prompt, GREEDY) for kv in (small, small, large)]
    sizes = []
    for kv, job in zip((small, small, large), jobs, strict=True):
        tokens = []
        for _ in range(8):
            tokens.append(job.next(20).token_ids[0])
            sizes.append(engine.decoding)
        assert tokens == kv.tokens
    assert max(sizes) <= 2


def test_unusable_local_prompts_are_refused(engine: DecodeEngine) -> None:
    for prompt in ([], [10**6], [-1], [5] * 8192):
        with pytest.raises(WireError):
            LocalJob(engine, prompt, GREEDY)


class Watched(PlainKV):
    """Notes the caches that are asked for, and may fail to allocate or to build them."""

    def __init__(self, failing: str = "") -> None:
        self.tokens: list[int] = []
        self._failing = failing

    def allocate(self, layer: LayerLayout, tokens: int, headroom: int) -> PlainKVBuffers:
        self.tokens.append(tokens)
        if self._failing == "allocate":
            raise MemoryError("no room for a cache")
        buffers = super().allocate(layer, tokens, headroom)
        if self._failing == "build":
            del buffers._arrays
        return buffers


@contextmanager
def warmed_up(
    model: Path, adapter: PlainKV, metrics: Metrics, progress: Progress | None = None
) -> Iterator[DecodeEngine]:
    source = find_model(str(model))
    engine = DecodeEngine(source, max_batch=3, metrics=metrics, progress=progress, warm_up=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_receiver.caches.model.adapters", lambda: [adapter])
        engine.start()
        try:
            engine.wait_loaded()
            yield engine
        finally:
            engine.stop()


def test_warming_up_leaves_no_trace(
    tiny_llama_path: Path, prefill: Prefill, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mlx_receiver")
    adapter, metrics = Watched(), Metrics()
    seen: list[tuple[str, int, int]] = []
    steps: set[int] = set()
    forward = Float32Logits.__call__

    def watched(self: Float32Logits, inputs: mx.array, cache: Any = None) -> Any:
        steps.add(inputs.shape[0])
        return forward(self, inputs, cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Float32Logits, "__call__", watched)
        with warmed_up(
            tiny_llama_path, adapter, metrics, lambda *step: seen.append(step)
        ) as engine:
            assert steps == {1, 2, 3}  # batches of one and of several; rows joined and left
            assert adapter.tokens == [tokens for tokens, _ in WARM_UP_JOBS for _ in range(4)]
            assert (engine.decoding, engine.waiting) == (0, 0)
            assert b"mlx_receiver_decoded_tokens_total 0.0" in generate_latest(metrics.registry)
            kv = prefill(255)
            assert generate_tokens(engine, kv.prompt, GREEDY) == kv.tokens
            assert b"mlx_receiver_decoded_tokens_total 8.0" in generate_latest(metrics.registry)
    assert re.fullmatch(r"warming up: .*\nwarmed up in [\d.]+ s", "\n".join(caplog.messages))
    assert [what for what, _, _ in seen] == sorted(what for what, _, _ in seen)
    loading, warming = (
        [step for step in seen if step[0] == what] for what in ("Loading", "Warming up")
    )
    assert loading[-1] == ("Loading", 4, 4)
    assert warming == sorted(warming)
    count = sum(sampling.max_tokens - 1 for _, sampling in WARM_UP_JOBS)
    assert warming[-1] == ("Warming up", count, count)


def test_the_warm_up_samples_in_every_way() -> None:
    """A way of sampling that it leaves out stalls the first response that asks for it."""
    plain = Sampling(max_tokens=1)
    for field in msgspec.structs.fields(Sampling):
        # Masks and biases, as bad words and logit_bias are, and a choice of log-probabilities.
        if field.name in ("eos_token_id", "allowed_token_ids", "end_token_ids", "grammar",
                          "logprob_token_ids", "thinking"):  # fmt: skip
            continue
        values = [getattr(sampling, field.name) for _, sampling in WARM_UP_JOBS]
        assert any(value != getattr(plain, field.name) for value in values), field.name


@pytest.mark.parametrize(
    ("failing", "said"), [("allocate", "no room for a cache"), ("build", "_arrays")]
)
def test_a_warm_up_that_fails_ends_the_start(
    failing: str, said: str, tiny_llama_path: Path
) -> None:
    with (
        pytest.raises(ModelError, match=f"cannot be decoded with.*{said}.*try another --dtype"),
        warmed_up(tiny_llama_path, Watched(failing), Metrics()),
    ):
        pass


def test_a_model_whose_logits_are_not_finite_is_not_served(
    tiny_llama_path: Path, tmp_path: Path
) -> None:
    """One weight too large for float16: all of its texts would be token 0."""
    for file in tiny_llama_path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (weights,) = tmp_path.glob("*.safetensors")
    arrays = dict(mx.load(str(weights)))
    name = next(name for name in arrays if name.endswith("norm.weight") and "layers" not in name)
    arrays[name] = arrays[name].astype(mx.float32) + 1e30
    mx.save_safetensors(str(weights), arrays, {"format": "pt"})
    source = find_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"not finite numbers in float16.*--dtype"):
        engine = DecodeEngine(source, dtype="float16", warm_up=True)
        engine.start()
        engine.wait_loaded()


def test_stopping_fails_what_is_left(tiny_llama_path: Path) -> None:
    engine = DecodeEngine(find_model(str(tiny_llama_path)), max_batch=1)
    engine.start()
    engine.wait_loaded()
    long = Sampling(max_tokens=5000, temperature=0.0)
    jobs = [LocalJob(engine, [30, 31], long) for _ in range(2)]
    jobs[0].next(10)
    engine.stop()
    for job in [*jobs, LocalJob(engine, [30], long)]:
        with pytest.raises(WireError, match="stopping"):
            while True:
                job.next(5)


def test_a_new_batch_keeps_mlxs_wired_limit(
    engine: DecodeEngine, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Mac's: each generator raises it and puts back what it was before."""
    limits = [0]

    def set_limit(limit: int) -> int:
        limits.append(limit)
        return limits[-2]

    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    module = sys.modules["mlx_lm.generate"]  # the package has a function of that name
    monkeypatch.setattr(module, "maybe_set_recommended_wired_limit", lambda: set_limit(100))
    kv = prefill(17)
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine._running.batch._generator, "next", lambda: 1 / 0)
            with pytest.raises(WireError, match="division by zero"):
                generate_tokens(engine, kv.prompt, GREEDY)
        assert generate_tokens(engine, kv.prompt, GREEDY) == kv.tokens
    assert limits == [0, 100, 0, 100]


def test_long_prefills_leave_time_for_running_responses(
    engine: DecodeEngine, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks become as short as the time allows, and long where there is time."""
    chunks: list[int] = []
    forward = Float32Logits.__call__

    def watched(self: Float32Logits, inputs: mx.array, cache: Any = None) -> Any:
        chunks.append(inputs.size)
        return forward(self, inputs, cache)

    monkeypatch.setattr(Float32Logits, "__call__", watched)
    kv = prefill(257)
    assert generate_tokens(engine, kv.prompt, GREEDY) == kv.tokens
    monkeypatch.setattr("mlx_receiver.decode.batch.PREFILL_SECONDS", 1e-6)
    assert generate_tokens(engine, kv.prompt, GREEDY) == kv.tokens
    chunks.clear()
    assert generate_tokens(engine, kv.prompt, GREEDY) == kv.tokens
    assert max(chunks) == 16
    monkeypatch.setattr("mlx_receiver.decode.batch.PREFILL_SECONDS", 100)
    chunks.clear()
    generate_tokens(engine, [30] * 400, GREEDY)
    assert chunks[:4] == [16, 32, 64, 128]


def test_a_hand_off_does_not_wait_for_others_prefills(
    tiny_llama_path: Path, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_receiver.decode.batch.PREFILL_SECONDS", 1e-6)
    engine = DecodeEngine(find_model(str(tiny_llama_path)), max_batch=16)
    engine.start()
    engine.wait_loaded()
    kv = prefill(17)
    locals_ = [LocalJob(engine, [30 + n] * 4000, GREEDY) for n in range(10)]
    sink = Collector()
    buffers = handed_over(engine, kv.prompt, kv.planes, 64)
    engine.submit(Job(kv.prompt, GREEDY, sink, kv.first, buffers.build))
    assert [kv.first, *sink.tokens()] == kv.tokens
    for job in locals_:
        with pytest.raises(queue.Empty):
            job.next(0)
        job.cancel()
    engine.stop()


def test_no_step_leaves_a_running_response_out(
    tiny_llama_path: Path, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However others join and leave: hand-offs, local prompts, short ones and long ones."""
    monkeypatch.setattr("mlx_receiver.decode.batch.PREFILL_SECONDS", 1e-3)
    steps: queue.SimpleQueue[dict[Job, bool]] = queue.SimpleQueue()

    class Steps:
        def decoded(self, outputs: list[Output]) -> None:
            steps.put({output.job: bool(output.finish) for output in outputs})

        def failed(self, job: Job, code: str, reason: str) -> None:
            raise AssertionError(reason)

    sink = Steps()
    engine = DecodeEngine(find_model(str(tiny_llama_path)), max_batch=16)
    engine.start()
    engine.wait_loaded()
    waiting = []
    for n in range(24):
        kv = prefill((5, 17, 130)[n % 3])
        sampling = msgspec.structs.replace(GREEDY, max_tokens=(3, 17, 40)[n * 5 % 7 % 3])
        if n % 4:
            build = handed_over(engine, kv.prompt, kv.planes, 64).build
            waiting.append(Job(kv.prompt, sampling, sink, kv.first, build))
        else:
            waiting.append(Job(kv.prompt, sampling, sink))
    seen: list[dict[Job, bool]] = []
    running = len(waiting)
    while running:
        for job in waiting[:2]:
            engine.submit(job)
        del waiting[:2]
        seen.append(steps.get(timeout=20))
        running -= sum(seen[-1].values())
    engine.stop()
    for job in {job for step in seen for job in step}:
        shown = [n for n, step in enumerate(seen) if job in step]
        # Who is shown its first token alone joins the batch in the step behind it.
        missed = shown[-1] - shown[1] + 1 - len(shown[1:])
        assert not missed, f"left out {missed} times between steps {shown[1]} and {shown[-1]}"
