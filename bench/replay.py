"""Replays the published two-machine hand-off on this machine, at its published speeds.

    python -m bench.replay
    python -m bench.replay --lengths 8192 --variants streamed --repeats 1 --link loopback

There is no such hardware here, so the two computations are waits (``bench.paced``). Everything
between them is real: a paged KV cache of that shape in torch, vLLM's side of the export
(``Exporter``), a 10 Gbit link between two network namespaces, the receiver's store, finished MLX
caches, every byte compared after each run.

Variants: ``streamed`` (each layer as it is computed), ``chunked`` (the same in 2,048-token steps),
``afterwards`` (everything once prefill is over) and ``link-bound`` (streamed, from a machine that
prefills in half of the time that the link needs). The first session of the two processes, whose
memory the system still has to find, is recorded apart from the medians. The clock is the sender's:
from the request to the arrival of the last token that the other side returned.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.lab import (
    LINK_10G,
    RESULTS,
    Child,
    Place,
    link_or_loopback,
    orders,
    record,
    save,
    tell,
)
from bench.paced import (
    BLOCK,
    LAYERS,
    OUTPUT_TOKENS,
    PUBLISHED,
    PUBLISHED_TOKENS,
    Sending,
    decode_seconds,
    exported,
    kv_bytes,
    meet_sender,
    paged_layer,
    prefill_seconds,
    sleep_until,
)
from bench.transport import HEAD_DIM, HEADS, Receiving, plane_data

VARIANTS = ("streamed", "chunked", "afterwards", "link-bound")

CHUNK = 2048


# --- the Mac's process ----------------------------------------------------------------------


def mac(transport: str, host: str) -> None:
    """Receives, builds the caches, "decodes" at the published pace, returns the tokens."""
    import mlx.core as mx

    side = Receiving(transport, host, LAYERS)
    mx.set_cache_limit(8 << 30)  # as the receiver does: buffers of earlier sessions are reused
    lines = meet_sender(side, host)
    for order in orders():
        message = lines.hear()
        began, cpu = time.monotonic(), time.process_time()
        side.open(message["open"], message["tokens"], wait=False)
        first = lines.hear()  # arrives after prefill, so the cache is nearly complete by then
        complete, caches = side.caches()
        built, cpu = time.monotonic(), time.process_time() - cpu
        for number in range(1, OUTPUT_TOKENS + 1):
            sleep_until(built + first["decode_s"] * number / OUTPUT_TOKENS)
            lines.say(token=number)
        timeline = side.session.timeline
        answer = {
            "began": began,
            "allocated_s": timeline.allocated_ns / 1e9 - began,
            "complete": complete,
            "built": built,
            "cpu_s": cpu,
            "stages": stages(timeline.blocks),
        }
        if order["verify"]:
            side.verify(caches)
        del caches
        side.end()
        tell(**answer)


def stages(blocks: list[Any]) -> dict[str, float]:
    """Where the blocks' time went, in seconds."""
    gather = [(b.gathered_ns - b.computed_ns) / 1e9 for b in blocks]
    queued = [(b.sent_ns - b.gathered_ns) / 1e9 for b in blocks]
    network = [(b.committed_ns - b.sent_ns) / 1e9 for b in blocks]
    last = max(b.computed_ns for b in blocks)
    return {
        "computed_to_gathered_median": statistics.median(gather),
        "computed_to_gathered_max": max(gather),
        "gathered_to_sent_max": max(queued),
        "sent_to_landed_median": statistics.median(network),
        "sent_to_landed_max": max(network),
        "last_layer_to_last_block": (max(b.committed_ns for b in blocks) - last) / 1e9,
    }


# --- the Spark's process --------------------------------------------------------------------


def paged_cache(tokens: int) -> tuple[dict[str, Any], float]:
    """An exporter's layers, filled, and GB/s of gathering one of them with nothing else going
    on."""
    import torch

    blocks, caches = -(-tokens // BLOCK), []
    for index in range(LAYERS):
        cache, layout = paged_layer(blocks)
        raw = cache.view(torch.int16).numpy()
        for plane in range(2):
            data = plane_data(index, plane, tokens).view(np.int16)
            padded = np.zeros((HEADS, blocks * BLOCK, HEAD_DIM), np.int16)
            padded[:, :tokens] = data
            raw[plane] = padded.reshape(HEADS, blocks, BLOCK, HEAD_DIM).swapaxes(0, 1)
        caches.append(cache)

    ids = torch.arange(blocks)
    out = torch.zeros((2, HEADS, blocks, BLOCK, HEAD_DIM), dtype=torch.bfloat16)
    began = time.perf_counter()
    for cache in caches:
        layout.gather(cache, ids, out)
    rate = LAYERS * out.nbytes / (time.perf_counter() - began) / 1e9
    return exported(caches, layout), rate


def spark(told_json: str, control: str, tokens: int) -> None:
    """ "Prefills" at the published pace through the real exporter and collects the tokens."""
    from vllm_mac_decode.export import ExportSpan

    layers, gather_rate = paged_cache(tokens)
    side = Sending(told_json, control, layers)
    lines = side.lines
    tell(gather_gb_per_s=gather_rate)
    for order in orders():
        session, variant = order["session"], order["variant"]
        request = f"replay-{session}"
        chunk = CHUNK if variant == "chunked" else tokens
        steps = [(at, min(at + chunk, tokens)) for at in range(0, tokens, chunk)]
        pace = 1.0
        if variant == "link-bound":
            pace = kv_bytes(tokens) / LINK_10G / 2 / prefill_seconds(0, tokens)
        cpu = time.process_time()
        began = time.monotonic()
        lines.say(open=session, tokens=tokens)
        moment = began
        for start, end in steps:
            blocks = list(range(start // BLOCK, -(-end // BLOCK)))
            span = ExportSpan(session, request, start, end, tokens, [blocks])
            seconds = pace * prefill_seconds(start, end)
            streams = variant != "afterwards"
            moment = side.prefill([span], session, moment, seconds, streams)
        prefilled = time.monotonic()
        lines.say(first_token=0, decode_s=decode_seconds(tokens))
        for _ in range(OUTPUT_TOKENS):
            lines.hear()
        done = time.monotonic()
        side.over(session, request)
        cpu = time.process_time() - cpu
        first = pace * prefill_seconds(*steps[0]) / LAYERS
        tell(began=began, first=began + first, prefilled=prefilled, done=done, cpu_s=cpu)
    side.close()


# --- measuring ------------------------------------------------------------------------------


def measure(
    places: tuple[Place, Place], tokens: int, variants: list[str], options: Any
) -> list[dict[str, Any]]:
    """The rows of one prompt length."""
    at_spark, at_mac = places
    me = ("-m", "bench.replay")
    rows = []
    nbytes = kv_bytes(tokens)
    with contextlib.ExitStack() as stack:
        arguments = ("--role", "mac", options.transport, at_mac.address)
        receiver = stack.enter_context(Child(at_mac, *me, *arguments))
        ready = receiver.answer()
        arguments = ("--role", "spark", json.dumps(ready), str(ready["control"]), str(tokens))
        sender = stack.enter_context(Child(at_spark, *me, *arguments))
        gather = sender.answer()["gather_gb_per_s"]
        sessions = itertools.count(1)

        def once(variant: str) -> dict[str, Any]:
            receiver.order(verify=not options.no_verify)
            ours = sender.ask(session=next(sessions), variant=variant)
            theirs = receiver.answer()
            return {
                "total_s": ours["done"] - ours["began"],
                "prefill_s": ours["prefilled"] - ours["began"],
                "exposed_s": theirs["built"] - ours["prefilled"],
                "transfer_s": theirs["built"] - ours["first"],
                "decode_s": ours["done"] - theirs["built"],
                "build_s": theirs["built"] - theirs["complete"],
                "allocated_s": theirs["allocated_s"],
                "spark_cpu_s": ours["cpu_s"],
                "mac_cpu_s": theirs["cpu_s"],
                "stages": theirs["stages"],
            }

        # Memory that no session has used yet has to be found by the system first.
        first = once(variants[0])
        for variant in variants:
            runs = [once(variant) for _ in range(options.repeats)]
            row: dict[str, Any] = {
                "tokens": tokens,
                "variant": variant,
                "bytes": nbytes,
                "verified": not options.no_verify,
                "link_floor_s": nbytes / LINK_10G,
                "compute_floor_s": prefill_seconds(0, tokens) + decode_seconds(tokens),
                "gather_alone_gb_per_s": gather,
                "runs": runs,
                "first_session": first if variant == variants[0] else None,
            }
            for key in (
                "total_s",
                "prefill_s",
                "exposed_s",
                "transfer_s",
                "decode_s",
                "spark_cpu_s",
                "mac_cpu_s",
            ):
                row[key] = statistics.median(run[key] for run in runs)
            rows.append(row)
    return rows


def show(result: dict[str, Any], console: Console) -> None:
    """The table."""
    table = Table(title="Paced replay: prefill on one side, decode on the other")
    names = ("tokens", "variant", "prefill", "exposed", "decode", "total", "floor", "CPU s", "GB")
    for column in names:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in result["rows"]:
        table.add_row(
            f"{row['tokens']:,}",
            row["variant"],
            f"{row['prefill_s']:.3f}",
            f"{row['exposed_s']:.3f}",
            f"{row['decode_s']:.3f}",
            f"{row['total_s']:.3f}",
            f"{row['compute_floor_s']:.3f}",
            f"{row['spark_cpu_s']:.2f} + {row['mac_cpu_s']:.2f}",
            f"{row['bytes'] / 1e9:.2f}",
        )
    console.print(table)
    console.print(
        f"Published, {PUBLISHED_TOKENS:,} tokens: together {PUBLISHED['together']} s, Spark alone "
        f"{PUBLISHED['spark_prefill'] + PUBLISHED['spark_decode']:.2f} s, Mac alone "
        f"{PUBLISHED['mac_prefill'] + PUBLISHED['mac_decode']:.2f} s. Link: {result['link']}."
    )
    if result["skipped"]:
        console.print(f"Skipped: {result['skipped']}")


def main() -> None:
    """Measure, print, and write JSON."""
    if sys.argv[1:2] == ["--role"]:
        if sys.argv[2] == "mac":
            mac(*sys.argv[3:])
        else:
            spark(sys.argv[3], sys.argv[4], int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 1024, 4096, 16384, 32768])
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        choices=VARIANTS,
    )
    parser.add_argument("--transport", default="tcp")
    parser.add_argument("--link", default="10gbit", help="a rate, or loopback")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--add", action="store_true", help="add the rows to those in --out")
    parser.add_argument("--out", type=Path, default=RESULTS / "replay.json")
    options = parser.parse_args()

    console = Console(stderr=True)
    result: dict[str, Any] = record("paced replay of the published hand-off") | {
        "published": PUBLISHED | {"tokens": PUBLISHED_TOKENS, "output_tokens": OUTPUT_TOKENS},
        "transport": options.transport,
        "link": options.link,
        "chunk": CHUNK,
        "skipped": "",
        "rows": [],
    }
    if options.add:
        earlier = json.loads(options.out.read_text())
        result["command"] = f"{earlier['command']}; {result['command']}"
        result["rows"] = earlier["rows"]
    with link_or_loopback(options.link) as (places, skipped):
        if skipped:
            result["skipped"], result["link"] = skipped, "loopback"
        for tokens in options.lengths:
            with console.status(f"{tokens:,} tokens"):
                result["rows"] += measure(places, tokens, options.variants, options)
            save(result, options.out)
    show(result, console)
    console.print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
