"""A coding agent's trace through vLLM and a receiver: what is sent, and how soon tokens come.

    python -m bench.agent servers      # real vLLM and a real receiver, a tiny model, a small trace
    python -m bench.agent paced        # Llama-3.1-8B's shape over shaped links, engines that wait
    python -m bench.agent crowd        # a thousand short conversations, memory watched

``servers`` runs the same calls against vLLM with a receiver that keeps what texts leave, against
the same vLLM with one that does not (``--no-prompt-cache``), and against a vLLM without the
connector; all texts are compared. Both engines share the machine's cores: the figures compare
the ways with each other. ``paced`` is described in ``bench.agent_paced``, the trace in
``bench.agent_trace``. Each writes a result of its own, in which what earlier processes measured is
remembered.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from bench.agent_paced import TOKEN_BYTES, fit, replay
from bench.agent_trace import Call, Histories, agent_trace, longest_common
from bench.lab import ALL_CORES, RESULTS, record, save, spread
from tests.servers import Receiver, Vllm, pair, start_receiver, start_vllm

# --- with real servers ----------------------------------------------------------------------


def ask(vllm: Vllm, name: str, prompt: list[int], answer: int, salt: str) -> dict[str, Any]:
    """A streamed greedy completion, and when its first and second token came."""
    body = {
        "model": vllm.name, "prompt": prompt, "max_tokens": answer, "temperature": 0,
        "ignore_eos": True, "stream": True, "return_token_ids": True, "cache_salt": salt,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    tokens: list[int] = []
    arrivals: list[float] = []
    cached = 0
    began = time.monotonic()
    with httpx.stream(
        "POST", f"{vllm.url}/v1/completions", json=body, timeout=120,
        headers={"X-Request-Id": name},
    ) as response:  # fmt: skip
        if response.status_code != 200:
            raise RuntimeError(response.read().decode())
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            said = json.loads(line[6:])
            for choice in said["choices"]:
                new = choice["token_ids"] or []
                tokens += new
                arrivals += [time.monotonic() - began] * len(new)
            if said.get("usage"):
                cached = (said["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "tokens": tokens,
        "cached_tokens": cached,
        "ttft_s": arrivals[0],
        "second_s": arrivals[1],
        "total_s": arrivals[-1],
    }


def _handoff(receiver: Receiver, name: str) -> dict[str, Any]:
    """What the receiver says of a hand-off that is over, or soon will be."""
    until = time.monotonic() + 20
    while True:
        known = httpx.get(f"{receiver.url}/handoffs", timeout=30).json()
        for one in known:
            if f"-{name}-" in one["request_id"] and one["ended_ns"]:
                return dict(one)
        if time.monotonic() > until:
            return {"held_tokens": 0, "kv_bytes": 0, "outcome": "not handed off"}
        time.sleep(0.02)


def run_trace(
    vllm: Vllm, receiver: Receiver | None, steps: Sequence[Sequence[Call]], salt: str
) -> list[dict[str, Any]]:
    """A row for each call, in the trace's order."""
    histories, texts, rows = Histories(), [], []  # type: ignore[var-annotated]
    numbers = iter(range(100_000))

    def one(call: Call, name: str, prompt: list[int]) -> dict[str, Any]:
        return ask(vllm, name, prompt, call.answer, salt)

    with ThreadPoolExecutor(4) as pool:
        for step in steps:
            prompts = [histories.prompt(call) for call in step]
            names = [f"{salt}-{next(numbers)}" for _ in step]
            answers = list(pool.map(one, step, names, prompts))
            news = [len(prompt) - longest_common(prompt, texts) for prompt in prompts]
            for call, name, prompt, answer, new in zip(
                step, names, prompts, answers, news, strict=True
            ):
                row = {
                    "who": call.who,
                    "turn": call.turn,
                    "at_once": len(step),
                    "stripped_tokens": call.stripped,
                    "prompt_tokens": len(prompt),
                    "new_tokens": new,
                    "text": hashlib.sha256(json.dumps(answer["tokens"]).encode()).hexdigest()[:16],
                } | {key: value for key, value in answer.items() if key != "tokens"}
                if receiver is not None:
                    told = _handoff(receiver, name)
                    row |= {key: told[key] for key in ("held_tokens", "kv_bytes", "outcome")}
                rows.append(row)
                histories.answered(call, prompt, answer["tokens"])
                texts.append([*prompt, *answer["tokens"]])
    return rows


#: Ways of serving: the receiver keeps what texts leave, it does not, and there is none.
WAYS = ("kept", "not_kept", "vllm_alone")


def servers(
    model: Path, logs: Path, seed: int, scale: float, turns: int, ways: Sequence[str]
) -> dict[str, Any]:
    """The trace in each of the ways, with an own salt for each in vLLM's prefix cache."""
    steps = agent_trace(seed, scale, turns)
    args = ("--max-model-len", "8192", "--enable-prompt-tokens-details")
    runs: dict[str, list[dict[str, Any]]] = {}

    def run(way: str, vllm: Vllm, receiver: Receiver | None) -> None:
        run_trace(vllm, receiver, steps[:2], f"warm-{way}")
        runs[way] = run_trace(vllm, receiver, steps, way)

    if "vllm_alone" in ways:
        alone = start_vllm(model, logs / "alone.log", args=args, env=ALL_CORES)
        try:
            run("vllm_alone", alone, None)
        finally:
            alone.server.stop()
    if "kept" in ways or "not_kept" in ways:
        with pair(model, logs, args=args, env=ALL_CORES) as (vllm, receiver):
            if "kept" in ways:
                run("kept", vllm, receiver)
            receiver.server.stop()
            if "not_kept" in ways:
                forgetful = start_receiver(
                    model, logs / "forgetful.log", port=receiver.port,
                    http_port=receiver.http_port, args=("--no-prompt-cache",),
                )  # fmt: skip
                try:
                    vllm.wait_connected(forgetful, 60)
                    run("not_kept", vllm, forgetful)
                finally:
                    forgetful.server.stop()
    return {"model": model.name, "scale": scale, "turns": turns, "runs": runs}


def compared(result: dict[str, Any]) -> dict[str, Any]:
    """What the runs come to, beside each other."""
    runs = result["runs"]
    token_bytes = next(
        (
            row["kv_bytes"] / (row["prompt_tokens"] - row["held_tokens"])
            for rows in runs.values()
            for row in rows
            if row.get("kv_bytes")
        ),
        1.0,
    )
    texts = [[row["text"] for row in rows] for rows in runs.values()]
    return {
        "token_bytes": token_bytes,
        "calls": len(texts[0]),
        "texts_differ": sum(len(set(same)) > 1 for same in zip(*texts, strict=True)),
        "summary": {name: summed(rows, token_bytes) for name, rows in runs.items()},
    }


def summed(rows: Sequence[dict[str, Any]], token_bytes: float) -> dict[str, Any]:
    """What a run's rows come to; the first call, which has no history, is not in it."""
    later = rows[1:]
    result: dict[str, Any] = {
        key: spread(row[key] for row in later) for key in ("ttft_s", "second_s")
    }
    result["after_first_s"] = spread(row["second_s"] - row["ttft_s"] for row in later)
    result["cached_share"] = round(
        sum(row.get("cached_tokens", 0) for row in later)
        / sum(row["prompt_tokens"] for row in later), 4
    )  # fmt: skip
    if "kv_bytes" in later[0]:
        result["sent_over_new"] = spread(
            row["kv_bytes"] / token_bytes / max(1, row["new_tokens"]) for row in later
        )
        result["sent_over_new"]["worst"] = round(
            max(row["kv_bytes"] / token_bytes / max(1, row["new_tokens"]) for row in later), 4
        )
        result["kv_bytes"] = sum(row["kv_bytes"] for row in rows)
        result["not_handed_off"] = sum(row["kv_bytes"] == 0 for row in rows)
    return result


# --- paced ----------------------------------------------------------------------------------


def paced(
    seed: int, turns: int, memory: int, transport: str, links: Sequence[str], ways: Sequence[str]
) -> dict[str, Any]:
    """The receiver keeps what texts leave, or does not, over each link. Where it does not, each
    call sends its whole history and depends on no other: some of them are enough.
    """
    runs = []
    for link in links:
        for keeps in [way == "kept" for way in WAYS[:2] if way in ways]:
            every = 1 if keeps else (4 if link == "10gbit" else 8)
            load = os.getloadavg()[0]
            rows, skipped = replay(
                link, keeps, seed=seed, turns=turns, every=every, memory=memory,
                transport=transport,
            )  # fmt: skip
            later = rows[1:]
            by_new, by_history, there = fit(
                [(row["new_tokens"], row["prompt_tokens"], row["second_s"]) for row in later]
            )
            run = {
                "load_1min_at_start": load,
                "nice": os.nice(0),
                "link": link if not skipped else "loopback",
                "skipped": skipped,
                "keeps": keeps,
                "every": every,
                "rows": rows,
                "summary": summed(rows, TOKEN_BYTES)
                | {
                    "exposed_s": spread(row["exposed_s"] for row in later),
                    "in_place": sum(row["in_place"] for row in later),
                    "second_s_in_place": spread(r["second_s"] for r in later if r["in_place"]),
                    "second_s_copied": spread(r["second_s"] for r in later if not r["in_place"]),
                    "mac_alone_second_s": spread(row["mac_alone_second_s"] for row in later),
                    "vllm_alone_second_s": spread(row["vllm_alone_second_s"] for row in later),
                    "second_s_per_1000_new_tokens": round(1000 * by_new, 4),
                    "second_s_per_1000_tokens_of_history": round(1000 * by_history, 4),
                    "second_s_else": round(there, 4),
                },
            }
            runs.append(run)
    return {"turns": turns, "kv_memory_bytes": memory, "transport": transport, "runs": runs}


# --- many conversations ---------------------------------------------------------------------


def crowd(
    model: Path,
    logs: Path,
    conversations: int,
    seed: int,
    memory: str,
    at_once: int,
    seconds: float,
    local: bool,
) -> dict[str, Any]:
    """Short conversations, one after the other in each of some threads; resident memory is read
    after every twentieth part of them. None begins after so many ``seconds``. ``local``: vLLM
    decodes them, with the connector but without a hand-off."""
    stay: dict[str, Any] = {"vllm_xargs": {"keep": "local"}} if local else {}
    samples: list[dict[str, Any]] = []
    lock, done = threading.Lock(), [0]
    with pair(
        model, logs, args=("--max-model-len", "1024"), receiver_args=("--kv-memory", memory)
    ) as (vllm, receiver):

        def sample() -> None:
            kept = receiver.health()["kv_resident_bytes"]
            samples.append(
                {
                    "conversations": done[0],
                    "receiver_mb": round(anonymous(receiver.server.process.pid) / 1e6, 1),
                    "kept_mb": round(kept / 1e6, 1),
                    "evicted": receiver.metric("mlx_receiver_evicted_texts_total"),
                    "vllm_mb": {
                        name: round(anonymous(pid) / 1e6, 1)
                        for name, pid in group(vllm.server.process.pid)
                    },
                }
            )

        def converse(number: int) -> None:
            if time.monotonic() > began + seconds:
                return
            rng = random.Random(1_000_000 * seed + number)
            text: list[int] = []
            for _ in range(rng.randint(2, 3)):
                text += [rng.randrange(20, 49000) for _ in range(rng.randint(30, 100))]
                text += vllm.tokens(text, rng.randint(3, 6), **stay)
            with lock:
                done[0] += 1
                if done[0] % max(1, conversations // 20) == 0:
                    sample()

        began = time.monotonic()
        sample()
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(converse, range(conversations)))
        took = time.monotonic() - began
        vllm.tokens([5, 6, 7], 3)
        held = vllm.metric("vllm:mac_decode_held_tokens_total")
        fallbacks = vllm.metric("vllm:mac_decode_fallbacks_total")
        receiver.assert_idle()
    half = samples[len(samples) // 2 :]
    return {
        "conversations": done[0],
        "at_once": at_once,
        "kv_memory": memory,
        "seconds": round(took, 1),
        "held_tokens": held,
        "fallbacks": fallbacks,
        "samples": samples,
        "second_half": {
            "conversations": half[-1]["conversations"] - half[0]["conversations"],
            "receiver_mb": round(half[-1]["receiver_mb"] - half[0]["receiver_mb"], 1),
            "vllm_mb": {
                name: round(end - half[0]["vllm_mb"].get(name, 0.0), 1)
                for name, end in half[-1]["vllm_mb"].items()
            },
        },
    }


def anonymous(pid: int) -> int:
    """Bytes of resident memory that belong to no file."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def group(leader: int) -> list[tuple[str, int]]:
    """Every process of a process group: its name and id."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            before, after = stat.read_text().rsplit(")", 1)
        except OSError:
            continue
        if int(after.split()[2]) == leader:
            pid, _, name = before.partition(" (")
            found.append((f"{name} {len(found)}" if name in dict(found) else name, int(pid)))
    return sorted(found)


#: What is said of a run that another process has repeated since.
_REMEMBERED = ("command", "date", "second_half", "held_tokens")


def joined(earlier: dict[str, Any] | None, part: dict[str, Any]) -> dict[str, Any]:
    """The part, with what an earlier process measured under ``earlier``, and with its runs over
    other links."""
    if earlier is None:
        return part
    if "runs" in part and isinstance(part["runs"], list):
        mine = {(run["link"], run["keeps"]): run for run in part["runs"]}
        for run in earlier["runs"]:
            again = mine.get((run["link"], run["keeps"]))
            if again is None:
                part["runs"].append(run)
            else:
                again["earlier"] = [*run.get("earlier", []), run["summary"]]
        if part["command"] != earlier["command"]:
            part["command"] = f"{earlier['command']}; {part['command']}"
        return part
    if "runs" in part:
        runs = earlier["runs"] | part["runs"]
        again = {way: earlier["summary"][way] for way in part["runs"] if way in earlier["runs"]}
        if part["command"] != earlier["command"]:
            part["command"] = f"{earlier['command']}; {part['command']}"
        part |= {
            "runs": runs,
            "earlier": [*earlier.get("earlier", []), *([again] if again else [])],
        }
        return part | compared(part)
    said = {key: earlier[key] for key in _REMEMBERED if key in earlier}
    said["load_1min_at_start"] = earlier["machine"]["load_1min_at_start"]
    control = {"local": earlier["local"]} if "local" in earlier else {}
    return part | control | {"earlier": [*earlier.get("earlier", []), said]}


def main() -> None:
    """Measure, print, and write JSON."""
    from tests.conftest import cached_model
    from tests.models import tiny_llama

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("servers", "paced", "crowd"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--scale", type=float, default=1 / 8, help="servers: of every length")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--links", nargs="+", default=["10gbit", "1gbit"], help="paced")
    parser.add_argument("--memory", type=float, default=48.0, help="paced: the receiver's KV, GB")
    parser.add_argument("--local", action="store_true", help="crowd: without hand-offs")
    parser.add_argument("--transport", default="tcp")
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--kv-memory", default="64MB", help="crowd: the receiver's")
    parser.add_argument("--at-once", type=int, default=8, help="crowd: conversations")
    parser.add_argument("--seconds", type=float, default=1e9, help="crowd: none begins later")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    model = cached_model("tiny-llama", tiny_llama)
    logs = Path(tempfile.mkdtemp(prefix="agent-"))
    part = record(f"an agent's trace: {options.mode}") | {"seed": options.seed}
    if options.mode == "servers":
        part |= servers(model, logs, options.seed, options.scale, options.turns, options.ways)
        part |= compared(part)
        print(json.dumps(part["summary"], indent=1), part["texts_differ"], "texts differ")
    elif options.mode == "paced":
        memory = int(options.memory * 1e9)
        part |= paced(
            options.seed, options.turns, memory, options.transport, options.links, options.ways
        )
        for run in part["runs"]:
            print(run["link"], "kept" if run["keeps"] else "not kept", json.dumps(run["summary"]))
    else:
        part |= crowd(
            model, logs, options.conversations, options.seed, options.kv_memory, options.at_once,
            options.seconds, options.local,
        )  # fmt: skip
        print(json.dumps(part["samples"], indent=1))
    out = options.out or RESULTS / f"agent_{options.mode}.json"
    earlier = json.loads(out.read_text()) if out.exists() else None
    if options.local:
        save((earlier or {}) | {"local": part}, out)
    else:
        save(joined(earlier, part), out)


if __name__ == "__main__":
    main()
