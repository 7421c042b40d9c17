"""Does MLX do here what the receiver takes for granted?"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from mlx_receiver.checks.finding import Finding, unchecked
from mlx_receiver.wire.layout import full_attention

if TYPE_CHECKING:
    from mlx_receiver.caches.adapter import CacheAdapter
    from mlx_receiver.decode.engine import DecodeEngine
    from mlx_receiver.decode.model import ModelSource

#: Logits of one step's tokens scatter by rounding. A choice that is further than this share of
#: their spread from the best one is another choice.
_NEAR: Final = 0.1

_TOKENS: Final = 24

#: A cache of two layers, of which not all tokens are there.
_LAYOUT: Final = full_attention(2, 4, 64, "bfloat16")
_RECEIVED: Final = 300

_UPDATE: Final = "pip install --upgrade 'mlx>=0.32,<0.34' 'mlx-lm>=0.32,<0.34', and report it"


def check_device(system: str = sys.platform) -> Finding:
    """MLX has a GPU to decode on."""
    import mlx.core as mx

    info = mx.device_info()
    called = info.get("device_name", "a device without a name")
    if mx.metal.is_available():
        limit = int(info["max_recommended_working_set_size"])
        memory = int(info["memory_size"])
        return Finding(
            "Metal", "fine",
            f"{called}: the GPU may use {limit / 2**30:.1f} of {memory / 2**30:.1f} GiB",
        )  # fmt: skip
    if system == "darwin":
        return Finding(
            "Metal", "wrong", f"MLX sees no Metal device, only {called}",
            "Run it on the Mac itself, not in a virtual machine, a container or under Rosetta",
        )  # fmt: skip
    return unchecked("Metal", f"no Metal here, MLX decodes on {called}")


def check_threads(adapter: CacheAdapter | None = None) -> Finding:
    """KV that one thread has written is, byte for byte and in place, what another decodes from."""
    from mlx_receiver.caches.model import ModelCache
    from mlx_receiver.caches.plain import PlainKV

    seen: list[Finding] = []
    cache = ModelCache(_LAYOUT, [adapter or PlainKV()])
    buffers = cache.allocate(_LAYOUT, _RECEIVED, 1)
    while buffers.grow():
        pass
    layers, (keys, _) = len(_LAYOUT.layers), _LAYOUT.layers[0].parts
    heads = keys.heads
    shape = (layers, 2, heads, _RECEIVED, keys.width)
    # Bytes below 128 twice make bfloat16 numbers that are finite.
    expected = np.random.default_rng(0).integers(0, 1 << 14, shape).astype(np.uint16)

    def write() -> None:
        for layer in range(layers):
            for part in range(2):
                rows = buffers.rows(layer, part, slice(0, heads), slice(0, _RECEIVED))
                data = memoryview(expected[layer, part].tobytes())
                for buffer in rows.buffers:
                    buffer[:] = data[: buffer.nbytes]
                    data = data[buffer.nbytes :]
                del buffer
                rows.buffers.clear()
                rows.written()

    def decode() -> None:
        seen.append(_decode_from(buffers, expected))

    for step in (write, decode):
        failure = _in_thread(step)
        if failure is not None:
            return Finding("threads", "wrong", f"{step.__name__} failed: {failure}", _UPDATE)
    return seen[0]


def _decode_from(buffers: Any, expected: NDArray[np.uint16]) -> Finding:
    """Compare what the caches hold before and after one more token."""
    import mlx.core as mx

    places = [_address(buffers.part(layer, part)) for layer, part in np.ndindex(expected.shape[:2])]
    caches = buffers.build()
    token = mx.zeros((1, expected.shape[2], 1, expected.shape[4]), mx.bfloat16)
    for when in ("handed over", "decoded from"):
        arrays = [array for cache in caches for array in (cache.keys, cache.values)]
        mx.eval(arrays)
        views = [np.array(array.view(mx.uint16), copy=False) for array in arrays]
        held = np.stack([view[0, :, :_RECEIVED] for view in views]).reshape(expected.shape)
        different = int((held != expected).sum())
        moved = sum(_address(view) != place for view, place in zip(views, places, strict=True))
        del views, arrays
        if different:
            return Finding(
                "threads", "wrong",
                f"{different} of {held.size} values differ once the cache is {when}", _UPDATE,
            )  # fmt: skip
        if moved:
            return Finding(
                "threads", "warning",
                f"MLX copies {moved} of {len(places)} arrays when the cache is {when}: each "
                "hand-off costs as much time and memory again", _UPDATE,
            )  # fmt: skip
        for cache in caches:
            cache.update_and_fetch(token, token)
    return Finding(
        "threads", "fine",
        f"{expected.nbytes >> 10} KiB written in one thread and decoded from in another: the same "
        "bytes, without a copy",
    )  # fmt: skip


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _in_thread(work: Callable[[], None]) -> Exception | None:
    """What the work raises in a thread of its own."""
    failures: list[Exception] = []

    def guarded() -> None:
        try:
            work()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    return failures[0] if failures else None


def greedy(
    model: Any, prompt: Sequence[int], count: int, device: Any, forced: Sequence[int] = ()
) -> tuple[list[int], NDArray[np.float32]]:
    """``count`` tokens that the model writes on that device, and the logits ``[count, vocab]`` they
    were chosen by. With ``forced`` the text goes on with those tokens, whichever it chooses."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    tokens: list[int] = []
    chosen_by = []
    with mx.stream(device):
        cache = make_prompt_cache(model)
        following = list(prompt)
        for index in range(count):
            logits = model(mx.array([following]), cache=cache)[0, -1].astype(mx.float32)
            chosen_by.append(np.array(logits))
            tokens.append(int(np.argmax(chosen_by[-1])))
            following = [forced[index] if forced else tokens[-1]]
    return tokens, np.stack(chosen_by)


def check_tokens(name: str, model: Any, prompt: Sequence[int], count: int = _TOKENS) -> Finding:
    """The GPU chooses the tokens that the CPU does."""
    import mlx.core as mx

    gpu = mx.default_device().type == mx.DeviceType.gpu
    began = time.perf_counter()
    tokens, logits = greedy(model, prompt, count, mx.gpu if gpu else mx.cpu)
    rate = count / (time.perf_counter() - began)
    if not np.isfinite(logits).all():
        return Finding(
            name, "wrong", "logits that are not finite",
            "Fetch the model again, or try --dtype bfloat16 or float32",
        )  # fmt: skip
    if not gpu:
        why = f"no GPU here; the CPU wrote {count} tokens, {rate:.0f}/s, from finite logits"
        return unchecked(name, why)
    _, reference = greedy(model, prompt, count, mx.cpu, forced=tokens)
    return compare(name, tokens, reference)


def compare(name: str, tokens: Sequence[int], reference: NDArray[np.float32]) -> Finding:
    """Tokens of the GPU, by the CPU's logits ``[tokens, vocab]`` for the same text."""
    best = reference.argmax(-1)
    lost = reference.max(-1) - reference[np.arange(len(tokens)), list(tokens)]
    equal = int((best == np.array(tokens)).sum())
    seen = f"{equal} of {len(tokens)} greedy tokens of the GPU are the CPU's"
    if not np.isfinite(reference).all() or (lost > _NEAR * reference.std(-1)).any():
        where = int(np.argmax(best != np.array(tokens)))
        return Finding(
            name, "wrong",
            f"{seen}; at token {where} the GPU's choice is worse by {lost[where]:.2g}", _UPDATE,
        )  # fmt: skip
    if equal < len(tokens):
        seen += f", the others are as likely within rounding ({lost.max():.2g})"
    return Finding(name, "fine", seen)


def check_recovery(source: ModelSource, break_engine: Callable[[DecodeEngine], str]) -> Finding:
    """After a decode step that fails, the next one is as good as the one before.

    ``break_engine`` provokes the failure, and returns what it was called; "" if nothing failed.
    """
    from mlx_receiver.checks.small_model import PROMPT
    from mlx_receiver.decode.engine import DecodeEngine
    from mlx_receiver.decode.local import generate_tokens
    from mlx_receiver.wire.messages import WireError
    from mlx_receiver.wire.sampling import Sampling

    name = "recovery"
    sampling = Sampling(max_tokens=_TOKENS, temperature=0.0)
    engine = DecodeEngine(source, max_batch=2)
    quiet, logging.root.manager.disable = logging.root.manager.disable, logging.ERROR
    try:
        engine.start()
        engine.wait_loaded()
        before = generate_tokens(engine, PROMPT, sampling)
        failure = break_engine(engine)
        if not failure:
            return Finding(name, "wrong", "a step that must fail did not", _UPDATE)
        after = generate_tokens(engine, PROMPT, sampling)
    except WireError as error:
        return Finding(name, "wrong", f"nothing is decoded after an error: {error}", _UPDATE)
    finally:
        logging.root.manager.disable = quiet
        engine.stop()
    if after != before:
        return Finding(name, "wrong", "after an error other tokens are decoded", _UPDATE)
    return Finding(
        name, "fine", f"{len(after)} tokens as before after a provoked error ({failure})"
    )


def provoke_error(engine: DecodeEngine) -> str:
    """Have the engine decode from a cache that its model cannot use, and on a Mac also ask for more
    memory than its GPU can give; what was done, "" where it did not fail."""
    import mlx.core as mx

    errors = {"a cache of another shape": lambda: _caches(engine, heads_too_many=1)}
    if mx.metal.is_available():
        rows = 1 + int(mx.device_info()["max_buffer_length"]) // (1 << 30)

        def too_large() -> list[Any]:
            mx.eval(mx.zeros((rows, 1 << 30), mx.uint8))
            return _caches(engine)

        errors["too much memory"] = too_large
    failed = [_failing_job(engine, build_cache) for build_cache in errors.values()]
    return ", ".join(errors) if all(failed) else ""


def _caches(engine: DecodeEngine, heads_too_many: int = 0) -> list[Any]:
    import msgspec

    from mlx_receiver.wire.layout import CacheLayout, LayerLayout

    assert engine.loaded is not None
    cache = engine.loaded.cache
    layers = [
        LayerLayout(
            layer.kind,
            [
                msgspec.structs.replace(part, heads=part.heads + heads_too_many)
                for part in layer.parts
            ],
        )
        for layer in cache.layout.layers
    ]
    buffers = cache.allocate(CacheLayout(layers), 8, 1)
    while buffers.grow():
        pass
    return buffers.build()


def _failing_job(engine: DecodeEngine, build_cache: Callable[[], list[Any]]) -> str:
    """Why a job over those caches fails; "" if it does not."""
    import queue

    from mlx_receiver.decode.jobs import Job
    from mlx_receiver.wire.sampling import Sampling

    ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    class Sink:
        def decoded(self, outputs: list[Any]) -> None:
            if any(output.finish for output in outputs):
                ended.put("")

        def failed(self, _job: Job, _code: str, reason: str) -> None:
            ended.put(reason)

    sampling = Sampling(max_tokens=4, temperature=0.0)
    engine.submit(Job([1] * 8, sampling, Sink(), first_token=2, build_cache=build_cache))
    return ended.get(timeout=30)
