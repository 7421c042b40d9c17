"""Time to a complete cache on a slow link: KV that comes, KV that is computed, and both at once.

    python -m bench.meet
    python -m bench.meet --lengths 2048 8192 --repeats 1

As in ``bench.replay`` vLLM's prefill and the Mac's are waits of the published lengths
(Llama-3.1-8B: 1.47 and 5.57 s for 8,192 tokens; a chunk takes no less than it takes to read the
weights once), and everything between them is real: a paged cache, the exporter, a shaped link, the
receiver's store, and what decides which tokens the receiver computes, writes and copies. All layers
are one layer's memory; one layer's bytes are compared after every run.

Variants: ``stream`` (all KV comes, layer by layer), ``compute`` (none does) and ``both`` (from the
end, while the receiver computes from the front). The clock runs from the request to the moment at
which every row is there. ``ideal`` is 1 / (1 / compute + 1 / stream) of the measured medians, and
``floor`` the same of the published rate and the link's bits.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.lab import (
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
    STEP_TOKENS,
    Paged,
    Sending,
    decode_seconds,
    kv_bytes,
    meet_sender,
    one_layer,
    prefill_seconds,
    rows,
    sleep_until,
    wrong_planes,
)
from bench.transport import Receiving
from mlx_receiver.wire.messages import Open
from mlx_receiver.wire.sampling import Sampling

VARIANTS = ("stream", "compute", "both")


def prompt_of(number: int, tokens: int) -> list[int]:
    """Any prompt, another one for each number."""
    return [20 + (31 * at + 977 * number) % 40000 for at in range(tokens)]


def mac_seconds(start: int, end: int) -> float:
    """What the Mac takes for a chunk: at its published rate, or a decode step for a short one."""
    slower = PUBLISHED["mac_prefill"] / PUBLISHED["spark_prefill"]
    return max(slower * prefill_seconds(start, end), decode_seconds(start) / OUTPUT_TOKENS)


def floor_seconds(tokens: int, link: str) -> float:
    """What nothing can beat: the Mac computes all the time, and every bit of the link is KV."""
    if "gbit" not in link:
        return 0.0
    load = kv_bytes(tokens) * 8e-9 / float(link.removesuffix("gbit"))
    return 1 / (1 / mac_seconds(0, tokens) + 1 / load)


# --- the Mac's process ----------------------------------------------------------------------


class Paced:
    """In the place of a ``LoadedModel``: "computes" ``bench.paced.rows`` at that pace."""

    @staticmethod
    def model(inputs: Any, cache: list[Any]) -> None:
        """A chunk. All layers are the first one's memory."""
        import mlx.core as mx

        began, (first, *others), tokens = time.monotonic(), cache, inputs[0].tolist()
        start = first.offset
        for other in others:
            other.keys = other.values = None  # or MLX would copy what it writes into
        new = [mx.array(rows(tokens, start, plane)).view(mx.bfloat16)[None] for plane in range(2)]
        first.update_and_fetch(*new)
        mx.eval(first.state)
        for other in others:
            other.keys, other.values, other.offset = first.state
        sleep_until(began + mac_seconds(start, start + len(tokens)))


class Meeting(Receiving):
    """The receiver's side, with the thread that computes."""

    def __init__(self, transport: str, host: str) -> None:
        from mlx_receiver.decode.fronts import Fronts

        super().__init__(transport, host, LAYERS)
        self.completed = 0.0
        self._fronts = Fronts()
        threading.Thread(target=self._compute, daemon=True).start()

    def begin(self, number: int, prompt: list[int], compute: bool) -> None:
        """Open a session."""
        self._done.clear()
        asked: Any = "front" if compute else "nothing"
        message = Open(number, "bench", prompt, Sampling(max_tokens=32), compute=asked)
        self.session = self.store.open(message, self, self._layout)

    def opened(self, session: Any) -> None:
        from mlx_receiver.caches.model import ModelCache
        from mlx_receiver.metrics import Metrics
        from mlx_receiver.sessions.front import Front

        if session.compute == "front":
            cache = ModelCache(self._layout)
            self._fronts.add(Front(session, cache, self.store.budget, Metrics(), self.complete))

    def complete(self, session: Any) -> None:
        self.completed = time.monotonic()
        super().complete(session)

    def _compute(self) -> None:
        while True:
            self._fronts.drop_unwanted()
            if self._fronts:
                self._fronts.compute(Paced(), 0)  # type: ignore[arg-type]
            else:
                time.sleep(0.001)

    def wait(self) -> None:
        """Until the cache is complete."""
        if not self._done.wait(300) or self._failure:
            raise RuntimeError(self._failure or self.session.missing())

    def check(self) -> None:
        """Raise RuntimeError unless one layer's bytes are the prompt's."""
        self.session.announced()
        self.session.started(0)  # as for decoding: late blocks are thrown away from here on
        cache, *_ = self.session.take_memory().build()
        if wrong_planes(cache, self.session.prompt_token_ids):
            raise RuntimeError("what was sent and computed is not what is there")


def mac(transport: str, host: str) -> None:
    """Receives and computes until the cache is complete."""
    import mlx.core as mx

    one_layer()
    mx.set_default_device(mx.cpu)
    mx.set_cache_limit(2 << 30)
    side = Meeting(transport, host)
    lines = meet_sender(side, host)
    for _ in orders():
        message = lines.hear()
        side.begin(message["open"], message["prompt"], message["compute"])
        side.wait()
        lines.say(complete=True)
        session = side.session
        answer = {
            "completed": side.completed,
            "kv_bytes": session.kv_bytes,
            "computed_bytes": session.computed_bytes,
            "blocks": session.timeline.blocks_received,
        }
        side.check()
        side.end()
        tell(**answer)


# --- the Spark's process --------------------------------------------------------------------


def spark(told_json: str, control: str, tokens: str) -> None:
    """ "Prefills" at the published pace through the real exporter."""
    from vllm_mac_decode.export import ExportSpan

    paged = Paged(int(tokens))
    side = Sending(told_json, control, paged.layers)
    lines = side.lines
    tell(ready=True)
    for order in orders():
        session, variant, count = order["session"], order["variant"], order["tokens"]
        request, prompt = f"meet-{session}", prompt_of(session, count)
        paged.write(prompt)
        began = moment = time.monotonic()
        lines.say(open=session, prompt=prompt, compute=variant != "stream")
        for start in range(0, count, STEP_TOKENS):
            end = min(start + STEP_TOKENS, count)
            blocks = [list(range(start // BLOCK, -(-end // BLOCK)))]
            span = ExportSpan(
                session, request, start, end, count, blocks, from_end=variant == "both"
            )
            spans = [span] if variant != "compute" else []
            moment = side.prefill(spans, session, moment, prefill_seconds(start, end))
        lines.hear()  # the cache is complete
        side.over(session, request if variant != "compute" else "")
        tell(began=began, freed=time.monotonic())
    side.close()


# --- measuring ------------------------------------------------------------------------------


def measure(places: tuple[Place, Place], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each length."""
    at_spark, at_mac = places
    me = ("-m", "bench.meet", "--role")
    found = []
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(Child(at_mac, *me, "mac", "tcp", at_mac.address))
        ready = receiver.answer()
        longest = str(max(options.lengths) + BLOCK)
        arguments = ("spark", json.dumps(ready), str(ready["control"]), longest)
        sender = stack.enter_context(Child(at_spark, *me, *arguments))
        sender.answer()
        sessions = itertools.count(1)

        def once(variant: str, tokens: int) -> dict[str, Any]:
            receiver.order()
            ours = sender.ask(session=next(sessions), variant=variant, tokens=tokens)
            theirs = receiver.answer()
            return {
                "seconds": theirs["completed"] - ours["began"],
                "freed_s": ours["freed"] - theirs["completed"],
                "kv_bytes": theirs["kv_bytes"],
                "computed_bytes": theirs["computed_bytes"],
                "blocks": theirs["blocks"],
            }

        once("both", min(options.lengths))  # memory that nobody has used yet has to be found
        for tokens in options.lengths:
            runs = {
                variant: [once(variant, tokens) for _ in range(options.repeats)]
                for variant in VARIANTS
            }
            medians = {
                f"{variant}_s": statistics.median(run["seconds"] for run in of)
                for variant, of in runs.items()
            }
            ideal = 1 / (1 / medians["compute_s"] + 1 / medians["stream_s"])
            computed = statistics.median(run["computed_bytes"] for run in runs["both"])
            found.append(
                {"tokens": tokens, "bytes": kv_bytes(tokens), **medians, "ideal_s": ideal}
                | {"floor_s": floor_seconds(tokens, options.link)}
                | {"computed_tokens": round(computed / kv_bytes(1)), "runs": runs}
            )
            print(found[-1] | {"runs": None}, file=sys.stderr)
    return found


def show(result: dict[str, Any], console: Console) -> None:
    """The table."""
    table = Table(title=f"Seconds to a complete cache, {result['link']} link")
    for column in ("tokens", "GB", *VARIANTS, "ideal", "above it", "floor", "computed"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            f"{row['tokens']:,}",
            f"{row['bytes'] / 1e9:.2f}",
            *(f"{row[f'{name}_s']:.2f}" for name in (*VARIANTS, "ideal")),
            f"{100 * (row['both_s'] / row['ideal_s'] - 1):.0f} %",
            f"{row['floor_s']:.2f}",
            f"{row['computed_tokens']:,}",
        )
    console.print(table)


def main() -> None:
    """Measure, print, and write JSON."""
    if sys.argv[1:2] == ["--role"]:
        {"mac": mac, "spark": spark}[sys.argv[2]](*sys.argv[3:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lengths = [2048, 4096, 8192, 16384, 32768]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--link", default="1gbit", help="a rate, or loopback")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--add", action="store_true", help="replace these lengths' rows in --out")
    parser.add_argument("--out", type=Path, default=RESULTS / "meet.json")
    options = parser.parse_args()
    console = Console(stderr=True)
    result: dict[str, Any] = record("time to a complete cache, sent and computed") | {
        "published": PUBLISHED | {"tokens": PUBLISHED_TOKENS},
        "link": options.link,
        "skipped": "",
    }
    with link_or_loopback(options.link) as (places, skipped):
        if skipped:
            result["skipped"], result["link"] = skipped, "loopback"
        found = measure(places, options)
        if options.add:
            earlier = json.loads(options.out.read_text())
            result["command"] = f"{earlier['command']}; {result['command']}"
            found += [row for row in earlier["rows"] if row["tokens"] not in options.lengths]
        result["rows"] = sorted(found, key=lambda row: row["tokens"])
    save(result, options.out)
    show(result, console)
    console.print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
