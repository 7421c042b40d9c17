"""Health, metrics and timelines over HTTP."""

from __future__ import annotations

from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from mlx_receiver.receiver import Receiver
from mlx_receiver.settings import Settings
from mlx_receiver.wire.sampling import Sampling
from tests.mlx_receiver.client import HERE, FakeVllm
from tests.mlx_receiver.conftest import Prefill
from tests.waiting import eventually

GREEDY = Sampling(max_tokens=8, temperature=0.0)


def url(receiver: Receiver, path: str) -> str:
    assert receiver.http is not None
    return f"http://127.0.0.1:{receiver.http.port}{path}"


def values(receiver: Receiver) -> dict[str, float]:
    text = httpx.get(url(receiver, "/metrics")).text
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_health_while_loading_and_after(tiny_llama_path: Path) -> None:
    receiver = Receiver(Settings(model=str(tiny_llama_path), **HERE, port=0, http_port=0))
    assert receiver.engine.loaded is None
    receiver.engine.start = lambda: None  # type: ignore[method-assign]
    receiver.start()
    try:
        answer = httpx.get(url(receiver, "/health"))
        assert (answer.status_code, answer.json()["status"]) == (503, "loading")
        assert not receiver.wait_ready(0.01)
    finally:
        receiver.stop()


def test_metrics_count_a_request(client: FakeVllm, prefill: Prefill) -> None:
    receiver = client.receiver
    kv = prefill(17)
    assert eventually(lambda: not receiver.engine.decoding)
    before = values(receiver)
    client.tokens(client.request(kv, GREEDY))
    assert eventually(lambda: not values(receiver)["mlx_receiver_kv_reserved_bytes"])
    after = values(receiver)

    def grown(name: str) -> float:
        return after[f"mlx_receiver_{name}"] - before.get(f"mlx_receiver_{name}", 0)

    assert grown("decoded_tokens_total") == 7
    assert grown("kv_bytes_total") == sum(p.nbytes for pair in kv.planes for p in pair)
    assert grown("sessions_total[finished]") == 1
    assert grown("handoff_seconds_count") == 1
    assert grown("decode_step_seconds_count") == 7
    assert after["mlx_receiver_sessions_active"] == 0


def test_the_timeline_of_a_hand_off(client: FakeVllm, prefill: Prefill) -> None:
    kv = prefill(17)
    session = client.request(kv, GREEDY)
    client.tokens(session)
    wanted = f"request-{session}"
    answer = httpx.get(url(client.receiver, f"/handoffs/{wanted}")).json()
    assert (answer["state"], answer["outcome"]) == ("ended", "finished")
    assert (answer["prompt_tokens"], answer["output_tokens"]) == (17, 8)
    stages = ("opened", "allocated", "complete", "first_decoded", "ended")
    times = [answer[f"{stage}_ns"] for stage in stages]
    assert times == sorted(times)
    assert len(answer["blocks"]) == answer["blocks_received"] == 8
    assert all(block["arrived_ns"] <= block["committed_ns"] for block in answer["blocks"])
    listed = httpx.get(url(client.receiver, "/handoffs")).json()
    assert wanted in [entry["request_id"] for entry in listed]
    assert httpx.get(url(client.receiver, "/handoffs/nobody")).status_code == 404
