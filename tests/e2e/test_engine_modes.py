"""Ways to run vLLM in which hand-offs are hard or impossible: the tokens are always MLX's own."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port
from tests.mlx_alone import greedy
from tests.servers import Receiver, Server, Vllm, start_receiver, start_vllm
from tests.waiting import eventually
from tests.warm import VLLM

pytestmark = pytest.mark.server

#: Also what takes a minute more, see ``test_families``.
ALL = bool(os.environ.get("MAC_DECODE_ALL_FAMILIES"))

#: 40 blocks of 32 tokens, and prefills that take many steps, three at a time, and begin where there
#: is no room for all of a prompt: blocks run out in their middle.
SMALL_CACHE = (
    "--block-size", "32", "--num-gpu-blocks-override", "40", "--max-model-len", "1024",
    "--max-num-batched-tokens", "48", "--max-num-seqs", "16", "--no-scheduler-reserve-full-isl",
    "--long-prefill-token-threshold", "16",
)  # fmt: skip


OFFLINE = """
import json, sys, time, urllib.request
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

def decoded():
    text = urllib.request.urlopen(metrics, timeout=10).read().decode()
    return float(text.split("\\nmlx_receiver_decoded_tokens_total ")[1].split()[0])

def generate(prompts, tokens):
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]

if __name__ == "__main__":
    model, receiver, metrics, prompts, tokens, connect = json.loads(sys.argv[1])
    extra = {"receiver": receiver, "stall_timeout": 20}
    llm = LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=1024,
        max_num_seqs=2, max_num_batched_tokens=64, long_prefill_token_threshold=32,
        kv_transfer_config=KVTransferConfig(
            kv_connector="mac_decode", kv_role="kv_producer", kv_connector_extra_config=extra
        ),
    )
    until, before = time.monotonic() + 30, decoded()
    while connect and decoded() == before and time.monotonic() < until:
        generate([[1, 2, 3]], 3)
    before = decoded()
    print("RESULT", json.dumps([generate(prompts, tokens), decoded() - before]), flush=True)
"""

BROKEN = """
import importlib, itertools, os

module, owner, method, calls = os.environ["BROKEN"].rsplit(".", 3)
owner = getattr(importlib.import_module("vllm_mac_decode." + module), owner)
real, made = getattr(owner, method), itertools.count()

def broken(*args, **kwargs):
    if os.path.exists(os.environ["ARMED"]) and next(made) >= int(calls):
        raise RuntimeError("a fault for this test")
    return real(*args, **kwargs)

setattr(owner, method, broken)
# OFFLINE
    open(os.environ["ARMED"], "w").close()
    prompts = [prompt[::-1] for prompt in prompts]  # others: the receiver holds what was said
    meanwhile = generate(prompts, tokens)
    time.sleep(1)
    before, began = decoded(), time.monotonic()
    afterwards = generate(prompts, tokens)
    outcome = [meanwhile, afterwards, decoded() - before, time.monotonic() - began]
    print("FAULTY", json.dumps(outcome), flush=True)
"""


def prompt_of(length: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(20, 49000) for _ in range(length)]


def decoded(receiver: Receiver) -> float:
    return receiver.metric("mlx_receiver_decoded_tokens_total")


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("modes")


@pytest.fixture(scope="module")
def port() -> int:
    """Where the server below looks for a receiver; the tests start and stop theirs there."""
    return free_port()


@pytest.fixture(scope="module")
def lonely(tiny_llama_path: Path, logs: Path, port: int) -> Iterator[Vllm]:
    """vLLM with a small KV cache, started while there is no receiver."""
    env = {"MAC_DECODE_STALL_TIMEOUT": "5"}
    vllm = start_vllm(
        tiny_llama_path, logs / "vllm.log", receiver=f"127.0.0.1:{port}", args=SMALL_CACHE, env=env
    )
    try:
        yield vllm
    finally:
        vllm.server.stop()


@contextmanager
def receiver_at(port: int, model: Path, log: Path, *args: str) -> Iterator[Receiver]:
    receiver = start_receiver(model, log, port=port, args=args)
    try:
        yield receiver
    finally:
        receiver.server.stop()


def wait_logged(vllm: Vllm, pattern: str, seconds: float = 30.0) -> list[str]:
    """The log lines that match, once there is one."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        lines = vllm.server.log.read_text(errors="replace").splitlines()
        if found := [line for line in lines if re.search(pattern, line)]:
            return found
        time.sleep(0.1)
    raise AssertionError(f"no line matches {pattern!r}: {vllm.server.tail()}")


def test_without_a_receiver_everything_is_local(
    lonely: Vllm, port: int, tiny_llama_path: Path
) -> None:
    prompts = [prompt_of(n, n) for n in (3, 200)]
    assert [lonely.tokens(p, 12) for p in prompts] == greedy(tiny_llama_path, prompts, 12)
    wait_logged(lonely, f"decoding locally: no receiver answers at 127.0.0.1:{port}")
    assert lonely.metric("vllm:mac_decode_local_total", reason="no_receiver") >= 2


def test_a_receiver_with_another_token_is_one_clear_line(
    lonely: Vllm, port: int, logs: Path, tiny_llama_path: Path
) -> None:
    pattern = r"decoding locally: the receiver at \S+ does not know this machine"
    prompt = prompt_of(50, 1)
    with receiver_at(port, tiny_llama_path, logs / "token.log", "--token", "secret") as receiver:
        wait_logged(lonely, pattern)
        assert [lonely.tokens(prompt, 12)] == greedy(tiny_llama_path, [prompt], 12)
        time.sleep(11)  # it has tried again
        assert len(wait_logged(lonely, pattern)) == 1
        assert "secret" not in lonely.server.log.read_text(errors="replace")
        assert decoded(receiver) == 0


def test_a_receiver_with_another_model_is_told_apart_by_field(
    lonely: Vllm, port: int, logs: Path, tiny_llama_path: Path, tiny_qwen3_path: Path
) -> None:
    prompt = prompt_of(50, 2)
    with receiver_at(port, tiny_qwen3_path, logs / "model.log") as receiver:
        (line,) = wait_logged(lonely, r"refuses: .*model_type")
        for field, here, there in (
            ("model_type", "qwen3", "llama"), ("layers", 3, 4),
            ("layers 0..2, keys: width", 64, 32),
        ):  # fmt: skip
            assert f"{field}: {here} here, {there} there" in line
        assert "vocab_size" not in line, "it is equal"
        assert [lonely.tokens(prompt, 12)] == greedy(tiny_llama_path, [prompt], 12)
        assert decoded(receiver) == 0


def test_a_receiver_that_appears_later_is_used_under_preemption(
    lonely: Vllm, port: int, logs: Path, tiny_llama_path: Path
) -> None:
    """Each prompt needs 19 or 20 of the 39 blocks that there are to use."""
    with receiver_at(port, tiny_llama_path, logs / "later.log") as receiver:
        lonely.wait_connected(receiver, 40)
        before = decoded(receiver)
        preemptions = lonely.metric("vllm:num_preemptions_total")
        prompts = [prompt_of(590 + 3 * i, i) for i in range(8)]
        # In one HTTP request, so that they come to the scheduler together.
        answer = lonely.complete(prompts, 12, ignore_eos=True)
        got = [choice["token_ids"] for choice in answer["choices"]]
        assert got == greedy(tiny_llama_path, prompts, 12)
        lonely.tokens([5, 6, 7], 3)
        assert lonely.metric("vllm:kv_cache_usage_perc") == 0, "every block was given back"
        assert lonely.metric("vllm:mac_decode_fallbacks_total", reason="preempted") > 0
        assert lonely.metric("vllm:num_preemptions_total") > preemptions
        assert decoded(receiver) > before
        receiver.assert_idle()


def test_when_vllm_dies_the_receiver_frees_its_sessions(
    lonely: Vllm, port: int, logs: Path, tiny_llama_path: Path
) -> None:
    """Comes after everything else that needs ``lonely``."""
    with receiver_at(port, tiny_llama_path, logs / "orphans.log") as receiver:
        lonely.wait_connected(receiver, 40)
        with ThreadPoolExecutor(3) as pool:
            for i in range(3):
                pool.submit(lonely.tokens, prompt_of(90, 500 + i), 900)
            assert eventually(lambda: receiver.health()["decoding"] == 3, 30, 0.1)
            assert receiver.health()["kv_reserved_bytes"] > 0
            lonely.server.signal(signal.SIGKILL)
        receiver.assert_idle(8)


@pytest.fixture(scope="module")
def other(tiny_llama_path: Path, logs: Path) -> Iterator[Receiver]:
    """A receiver for the engines that are started below."""
    with receiver_at(free_port(), tiny_llama_path, logs / "receiver.log") as receiver:
        yield receiver


def run_offline(text: str, arguments: list[Any], folder: Path, **env: str) -> str:
    """What the program prints that ``text`` is; it must succeed."""
    script = folder / "offline.py"
    script.write_text(text)
    command = [sys.executable, str(script), json.dumps(arguments)]
    program = Server(command, folder / "offline.log", {"VLLM_CPU_KVCACHE_SPACE": "1"} | env, VLLM)
    try:
        status = program.process.wait(240)
    finally:
        program.stop()
    output = program.log.read_text(errors="replace")
    assert status == 0, output[-4000:]
    return output


def printed(output: str, what: str) -> Any:
    """The JSON behind the word ``what``."""
    found = re.search(rf"{what} (.*)", output)
    assert found is not None, output[-4000:]
    return json.loads(found[1])


@pytest.mark.parametrize("in_process", [False, True])
def test_offline_inference(
    in_process: bool, other: Receiver, tiny_llama_path: Path, tmp_path: Path
) -> None:
    prompts = [prompt_of(n, 300 + n) for n in (1, 40, 300)]
    metrics = f"{other.url}/metrics"
    arguments = [str(tiny_llama_path), other.address, metrics, prompts, 16, not in_process]
    multiprocessing = "0" if in_process else "1"
    output = run_offline(
        OFFLINE, arguments, tmp_path, VLLM_ENABLE_V1_MULTIPROCESSING=multiprocessing
    )
    tokens, by_receiver = printed(output, "RESULT")
    assert tokens == greedy(tiny_llama_path, prompts, 16)
    assert by_receiver == (0 if in_process else 3 * 15)
    reason = "decoding locally: the engine runs inside the caller's process"
    assert output.count(reason) == (1 if in_process else 0)


@pytest.mark.parametrize(
    ("method", "calls"),
    [
        ("scheduler.relay.Relay.scheduled", 2),
        ("scheduler.export_plan.ExportPlan.forget", 0),
        ("worker.exporter.Exporter.layer_written", 9),
        ("worker.paged_layout.PagedLayout.gather", 9),
    ],
)
def test_a_fault_of_ours_leaves_the_engine_serving(
    method: str, calls: int, other: Receiver, tiny_llama_path: Path, tmp_path: Path
) -> None:
    """Scheduler half, worker half and the export's thread: with responses in every state."""
    # Two at a time in small steps: one has ended and one is being exported when the third comes.
    # Of its own for each, since the receiver holds what was said before.
    prompts = [prompt_of(n, n + sum(method.encode())) for n in (60, 300, 50, 200)]
    arguments = [str(tiny_llama_path), other.address, f"{other.url}/metrics", prompts, 16, True]
    output = run_offline(
        BROKEN.replace("# OFFLINE", OFFLINE),
        arguments,
        tmp_path,
        BROKEN=f"{method}.{calls}",
        ARMED=str(tmp_path / "armed"),
    )
    meanwhile, afterwards, by_receiver, seconds = printed(output, "FAULTY")
    expected = greedy(tiny_llama_path, [prompt[::-1] for prompt in prompts], 16)
    assert meanwhile == expected
    assert afterwards == expected
    assert by_receiver == 0, "it is off for good"
    assert seconds < 20, "nobody waited for stall_timeout"
    assert 1 <= output.count("decoding locally from now on") <= 2, "one line in each half"


def test_tensor_parallel_workers(other: Receiver, tiny_llama_path: Path, logs: Path) -> None:
    prompts = [prompt_of(n, 400 + n) for n in (1, 33, 128, 300)]
    vllm = start_vllm(
        tiny_llama_path,
        logs / "tp.log",
        receiver=other.address,
        args=("--tensor-parallel-size", "2", "--max-num-batched-tokens", "256"),
        env={"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )
    try:
        vllm.wait_connected(other)
        before = decoded(other)
        assert [vllm.tokens(p, 24) for p in prompts] == greedy(tiny_llama_path, prompts, 24)
        assert decoded(other) - before == 4 * 23
        vllm.tokens([5, 6, 7], 3)
        assert vllm.metric("vllm:kv_cache_usage_perc") == 0
    finally:
        vllm.server.stop()


@pytest.mark.skipif(not ALL, reason="it takes a minute (MAC_DECODE_ALL_FAMILIES=1)")
def test_data_parallel_engines(other: Receiver, tiny_llama_path: Path, logs: Path) -> None:
    """Each of them is a client of the one receiver."""
    prompts = [prompt_of(n, 500 + n) for n in (33, 40, 100, 128, 150, 300)]
    vllm = start_vllm(
        tiny_llama_path,
        logs / "dp.log",
        receiver=other.address,
        args=("--data-parallel-size", "2", "--max-num-batched-tokens", "256"),
        env={"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )
    try:

        def decoded_for(engine: int) -> float:
            return vllm.metric("vllm:mac_decode_tokens_total", engine=str(engine))

        def both() -> bool:
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda n: vllm.tokens([n, 2, 3], 3), range(1, 5)))
            return min(decoded_for(0), decoded_for(1)) > 0

        assert eventually(both, 30), vllm.server.tail()
        vllm.tokens([5, 6, 7], 3)
        before = decoded(other)
        with ThreadPoolExecutor(len(prompts)) as pool:
            found = list(pool.map(lambda prompt: vllm.tokens(prompt, 24), prompts))
        assert found == greedy(tiny_llama_path, prompts, 24)
        assert decoded(other) - before == len(prompts) * 23
    finally:
        vllm.server.stop()
