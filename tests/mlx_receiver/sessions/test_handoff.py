"""A prompt prefilled elsewhere continues exactly as if MLX had prefilled it."""

from __future__ import annotations

import random
import time

import mlx.core as mx
import msgspec
import pytest

from mlx_receiver.decode.local import LocalJob, generate_tokens
from mlx_receiver.receiver import Receiver
from mlx_receiver.wire.layout import CacheLayout, layout_from_config, windowed
from mlx_receiver.wire.messages import Opened, Welcome
from mlx_receiver.wire.sampling import Sampling
from tests.mlx_receiver.client import FakeVllm, block, blocks, connected
from tests.mlx_receiver.conftest import Prefill
from tests.waiting import eventually

GREEDY = Sampling(max_tokens=8, temperature=0.0)


@pytest.mark.parametrize("tokens", [1, 2, 17, 255, 256, 257])
def test_decoded_tokens_equal_mlx_alone(client: FakeVllm, prefill: Prefill, tokens: int) -> None:
    kv = prefill(tokens)
    session = client.request(kv, GREEDY, random.Random(tokens))
    assert [kv.first, *client.tokens(session)] == kv.tokens


def test_decoding_past_the_reserved_headroom(
    client: FakeVllm, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_receiver.caches.memory.HEADROOM", 1)
    kv = prefill(250, decode=20)
    sampling = msgspec.structs.replace(GREEDY, max_tokens=20)
    session = client.open(kv.prompt, sampling)
    assert isinstance(client.opened(session), Opened)
    client.send_kv(session, kv)
    client.start(session, kv.first)
    assert [kv.first, *client.tokens(session)] == kv.tokens


def test_first_token_before_the_last_block(client: FakeVllm, prefill: Prefill) -> None:
    kv = prefill(17)
    session = client.open(kv.prompt, GREEDY)
    client.opened(session)
    client.start(session, kv.first)
    client.send_kv(session, kv)
    assert [kv.first, *client.tokens(session)] == kv.tokens


def test_positions_and_finish(client: FakeVllm, prefill: Prefill) -> None:
    kv = prefill(17)
    steps = list(client.steps(client.request(kv, GREEDY)))
    assert [step.position for step in steps] == list(range(1, 8))
    assert [step.finish for step in steps] == [""] * 6 + ["length"]


def test_stop_ids_and_end_of_text(client: FakeVllm, prefill: Prefill) -> None:
    kv = prefill(17)
    third = kv.tokens[2]
    stops = msgspec.structs.replace(GREEDY, stop_token_ids=[third])
    last = list(client.steps(client.request(kv, stops)))[-1]
    assert (last.token_ids, last.finish, last.stop_reason) == ([third], "stop", third)
    ends = msgspec.structs.replace(GREEDY, eos_token_id=third)
    last = list(client.steps(client.request(kv, ends)))[-1]
    assert (last.token_ids, last.finish, last.stop_reason) == ([third], "stop", None)
    held = msgspec.structs.replace(ends, min_tokens=8)
    assert third not in client.tokens(client.request(kv, held))


def test_a_first_token_that_ends_the_text_needs_no_decoding(
    client: FakeVllm, prefill: Prefill
) -> None:
    kv = prefill(17)
    (only,) = client.steps(client.request(kv, msgspec.structs.replace(GREEDY, max_tokens=1)))
    assert (only.token_ids, only.finish) == ([], "length")


def test_sessions_join_and_leave_a_running_batch(receiver: Receiver, prefill: Prefill) -> None:
    rng = random.Random(4)
    kvs = [prefill(tokens, decode=8) for tokens in (2, 17, 255, 257, 17, 2)]
    with connected(receiver) as one, connected(receiver) as two:
        running = []
        for kv in kvs:
            client = rng.choice([one, two])
            sampling = msgspec.structs.replace(GREEDY, max_tokens=rng.randrange(3, 9))
            running.append((client, client.request(kv, sampling, rng), kv, sampling))
            time.sleep(rng.random() * 0.03)
        for client, session, kv, sampling in running:
            assert [kv.first, *client.tokens(session)] == kv.tokens[: sampling.max_tokens]


def test_one_step_message_carries_all_sessions_of_a_client(
    client: FakeVllm, prefill: Prefill
) -> None:
    kvs = [prefill(17), prefill(2)]
    sampling = msgspec.structs.replace(GREEDY, max_tokens=30)
    sessions = [client.request(kv, sampling) for kv in kvs]
    for session in sessions:
        client.tokens(session)
    assert client.largest_step == 2


def test_a_seeded_text_does_not_depend_on_its_neighbours(
    client: FakeVllm, prefill: Prefill
) -> None:
    kv = prefill(17)
    seeded = Sampling(max_tokens=8, temperature=0.9, top_p=0.95, seed=5)
    alone = client.tokens(client.request(kv, seeded))
    noise = Sampling(max_tokens=30, temperature=1.0)
    others = [client.request(prefill(n), noise) for n in (2, 255)]
    assert client.tokens(client.request(kv, seeded)) == alone
    for other in others:
        client.cancel(other)


def test_mixed_sampling_in_one_batch(client: FakeVllm, prefill: Prefill) -> None:
    kv = prefill(17)
    plain = client.request(kv, GREEDY)
    penalised = client.request(
        kv, msgspec.structs.replace(GREEDY, logit_bias={5: 1000.0}, logprobs=2)
    )
    plain_again = client.request(kv, msgspec.structs.replace(GREEDY, logprobs=1))
    assert client.tokens(plain) == kv.tokens[1:]
    biased = list(client.steps(penalised))
    assert [step.token_ids for step in biased] == [[5]] * 7
    # Log-probabilities are those before the bias.
    assert biased[0].logprobs[0].token_ids[:2] == [5, kv.tokens[1]]
    steps = list(client.steps(plain_again))
    assert [step.token_ids[0] for step in steps] == kv.tokens[1:]
    assert all(step.logprobs[0].rank == 1 for step in steps)


def test_kv_in_another_dtype_is_converted(receiver: Receiver, prefill: Prefill) -> None:
    import numpy as np

    kv = prefill(17)
    floats = [[plane.view(np.float32).astype(np.float16) for plane in pair] for pair in kv.planes]
    half = type(kv)(kv.prompt, [[p.view(np.uint16) for p in q] for q in floats], "float16", [])
    exact = type(kv)(
        kv.prompt,
        [[p.astype(np.float32).view(np.uint32) for p in q] for q in floats],
        "float32",
        [],
    )
    texts = []
    for given in (half, exact):
        given.tokens = kv.tokens
        with connected(receiver, kv_dtype=given.dtype) as client:
            texts.append(client.tokens(client.request(given, GREEDY)))
    assert texts[0] == texts[1]


def test_identical_duplicates_and_overlaps_are_accepted(client: FakeVllm, prefill: Prefill) -> None:
    kv = prefill(17)
    session = client.open(kv.prompt, GREEDY)
    client.opened(session)
    assert client.data is not None
    frames = blocks(session, kv, random.Random(1))
    for header, payload in [*frames[: len(frames) // 2], *frames[: len(frames) // 3]]:
        client.data.send(header, [payload])
    header, payload = block(session, kv, 0, 0, slice(0, 2), slice(3, 12))
    client.data.send(header, [payload])
    for header, payload in frames[len(frames) // 2 :]:
        client.data.send(header, [payload])
    assert client.complete(session).kv_bytes == sum(p.nbytes for pair in kv.planes for p in pair)
    client.start(session, kv.first)
    assert [kv.first, *client.tokens(session)] == kv.tokens


def test_several_workers_send_their_own_heads_and_layers(
    client: FakeVllm, prefill: Prefill
) -> None:
    kv = prefill(17)
    session = client.open(kv.prompt, GREEDY)
    client.opened(session)
    workers = [client.connect_data() for _ in range(2)]
    for layer in range(len(kv.planes)):
        for plane in range(2):
            for head, worker in enumerate(workers):
                header, payload = block(
                    session, kv, layer, plane, slice(head, head + 1), slice(0, 17)
                )
                worker.send(header, [payload])
    client.start(session, kv.first)
    assert [kv.first, *client.tokens(session)] == kv.tokens
    for worker in workers:
        worker.close()


def test_memory_returns_to_what_it_was(client: FakeVllm, prefill: Prefill) -> None:
    kv = prefill(257)
    store, engine = client.receiver.store, client.receiver.engine
    assert client.tokens(client.request(kv, GREEDY)) == kv.tokens[1:]

    def idle() -> bool:
        return not store.sessions() and not engine.decoding

    assert eventually(idle)
    before = mx.get_active_memory()
    slack = 2 << 20  # logits and other small leftovers of the last step
    for how in ("finish", "cancel while receiving", "cancel while decoding"):
        sampling = msgspec.structs.replace(GREEDY, max_tokens=4 if how == "finish" else 5000)
        session = client.open(kv.prompt, sampling)
        client.opened(session)
        assert store.reserved_bytes > 0
        if how != "cancel while receiving":
            client.send_kv(session, kv)
            client.start(session, kv.first)
            next(client.steps(session))
        if how == "finish":
            client.tokens(session)
        else:
            client.cancel(session)
        assert eventually(idle), how
        assert eventually(lambda: store.reserved_bytes == 0), how
        assert eventually(lambda: mx.get_active_memory() <= before + slack), how


def test_a_local_prompt_decodes_beside_handed_over_ones(client: FakeVllm, prefill: Prefill) -> None:
    engine = client.receiver.engine
    one, other = prefill(17), prefill(255)
    session = client.request(other, msgspec.structs.replace(GREEDY, max_tokens=8))
    assert generate_tokens(engine, one.prompt, GREEDY) == one.tokens
    assert client.tokens(session) == other.tokens[1:]


def test_a_cancelled_local_job_leaves_the_batch(receiver: Receiver, prefill: Prefill) -> None:
    job = LocalJob(receiver.engine, prefill(17).prompt, Sampling(max_tokens=5000, temperature=0.0))
    assert job.next(10).position == 0
    job.cancel()
    assert eventually(lambda: receiver.engine.decoding == 0)


def test_a_window_that_this_model_does_not_know_bounds_the_text(
    receiver: Receiver, prefill: Prefill
) -> None:
    """vLLM's attention has one: what both engines compute is equal until it is full."""
    window = 40
    whole = layout_from_config(receiver.source.config, "float32")
    layout = CacheLayout([windowed(layer, window) for layer in whole.layers])
    client = FakeVllm(receiver)
    try:
        welcome = client.hello(layout=layout)
        assert isinstance(welcome, Welcome) and welcome.max_tokens == window
        kv = prefill(30, decode=12)
        session = client.request(kv, Sampling(max_tokens=24, temperature=0.0))
        steps = list(client.steps(session))
        assert steps[-1].finish == "length", "where the promise says that it ends"
        assert [t for step in steps for t in step.token_ids] == kv.tokens[1 : window - 30]
        session = client.open([5] * window, Sampling(max_tokens=4))
        assert "fills the model's 40" in client.opened(session).reason
        session = client.open([5] * 20, Sampling(max_tokens=4), {"unclaimed": True})
        assert "the same cache for 40 tokens only" in client.opened(session).reason
    finally:
        client.close()
