"""How fast each data transport fills finished MLX caches, beside the floors of the same run.

    python -m bench.transport                      # loopback and a shaped 10 Gbit link
    python -m bench.transport --transports tcp --tokens 2048 --repeats 2 --links loopback

One process sends the KV of a prompt (Llama-3.1-8B's shape, bf16) frame by frame, another one lands
it through the receiver's real store and session and builds the MLX caches. The clock runs from the
sender's first frame to the last finished MLX array; every byte is compared afterwards.

Floors: ``memcpy`` (NumPy, one thread) and what the link lets through. ``sockets`` is what two plain
programs get: ``sendall`` and ``recv_into`` with MSG_WAITALL, 8 MiB out of and into one reused
buffer, without frames, sessions or a cache. A transport's name with ``+checksum`` is that transport
with a checksum of every block, made by the sender and compared by the receiver; ``+signed`` and
``+sealed`` are ``tcp`` with every frame authenticated, or encrypted, too, as between machines.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.lab import (
    LINK_10G,
    LOOPBACK,
    RESULTS,
    Child,
    NoRights,
    Place,
    orders,
    record,
    save,
    shaped_link,
    tell,
)
from mlx_receiver import plugins
from mlx_receiver.transports.data_socket import tune
from mlx_receiver.transports.landing import checksum
from mlx_receiver.transports.tcp import TcpTransport
from mlx_receiver.transports.transport import Transport
from mlx_receiver.wire.frames import Header, Kind, Level
from mlx_receiver.wire.keys import new_ticket
from mlx_receiver.wire.layout import CacheLayout, full_attention
from mlx_receiver.wire.messages import DataTicket, Endpoint, Open
from mlx_receiver.wire.sampling import Sampling

HEADS, HEAD_DIM, ITEM = 8, 128, 2
MESSAGE = 8 << 20

#: What may stand behind a transport's name.
CHECKED = "checksum"
LEVELS: tuple[Level, ...] = ("signed", "sealed")


def layout(layers: int) -> CacheLayout:
    """Llama-3.1-8B's cache with that many layers."""
    return full_attention(layers, HEADS, HEAD_DIM, "bfloat16")


def transport_of(name: str) -> Transport:
    """The transport of a row: ``tcp`` is as clear on a link as over loopback, unless it says."""
    bare, _, variant = name.partition("+")
    if bare != "tcp":
        return plugins.transport(bare)
    return TcpTransport(next((level for level in LEVELS if level == variant), "clear"))


def plane_data(layer: int, plane: int, tokens: int) -> np.ndarray[Any, Any]:
    """What the plane must hold, ``[heads, tokens, head_dim]`` uint16; the same in any process."""
    rng = np.random.Generator(np.random.SFC64(1000 * layer + plane))
    words = HEADS * tokens * HEAD_DIM * ITEM // 8
    data: np.ndarray[Any, Any] = rng.integers(0, 2**64, words, np.uint64, endpoint=False)
    return data.view(np.uint16).reshape(HEADS, tokens, HEAD_DIM)


# --- the receiving process ------------------------------------------------------------------


class Receiving:
    """The receiver's store, one listener and one client: a ``SessionEvents`` and an ``Owner``."""

    def __init__(
        self,
        transport: str,
        host: str,
        layers: int,
        memory: int = 64 << 30,
        keeps: bool = False,
    ) -> None:
        """``memory`` is the store's budget in bytes; ``keeps``: what texts leave."""
        from mlx_receiver.caches.model import ModelCache
        from mlx_receiver.metrics import Metrics
        from mlx_receiver.sessions.store import SessionStore

        self._layers = layers
        self._done = threading.Event()
        self._failure = ""
        self.store = SessionStore(max_sessions=1, events=self, metrics=Metrics(), keeps=keeps)
        self._layout = layout(layers)
        self.ticket = new_ticket()
        self.id = self.ticket.client
        self.store.admit(self.ticket)
        self.store.configure(ModelCache(self._layout), memory)
        self.listener = transport_of(transport).listen(host, 0, self.store, plain=True)

    def opened(self, session: Any) -> None:
        pass

    def complete(self, session: Any) -> None:
        self._done.set()

    def failed(self, session: Any, code: str, reason: str) -> None:
        self._failure = f"{code}: {reason}"
        self._done.set()

    def open(self, number: int, tokens: int, wait: bool = True) -> None:
        """Reserve a session's memory, and wait until all of it is allocated."""
        self._done.clear()
        message = Open(number, "bench", list(range(tokens)), Sampling(max_tokens=32))
        self.session = self.store.open(message, self, self._layout)
        until = time.monotonic() + 60
        while wait and self.session.allocated_layers < self._layers:
            if time.monotonic() > until:
                raise RuntimeError("no memory within 60 s")
            time.sleep(0.01)

    def caches(self) -> tuple[float, list[Any]]:
        """Wait for the last block and build the MLX caches; also when it had arrived."""

        if not self._done.wait(120) or self._failure:
            raise RuntimeError(self._failure or self.session.missing())
        complete = time.monotonic()
        return complete, self.session.take_memory().build()

    def verify(self, caches: list[Any]) -> None:
        """Raise RuntimeError unless every byte is what ``plane_data`` says."""
        import mlx.core as mx

        tokens, wrong = self.session.tokens, 0
        for layer, cache in enumerate(caches):
            for plane, array in enumerate((cache.keys, cache.values)):
                held = np.array(array.view(mx.uint16), copy=False)[0, :, :tokens]
                wrong += not np.array_equal(held, plane_data(layer, plane, tokens))
        if wrong:
            raise RuntimeError(f"{wrong} planes differ from what was sent")

    def end(self) -> None:
        """Free the session."""
        self.store.end(self.session, "done")


def told(side: Receiving) -> dict[str, Any]:
    """What the sending process must know."""
    names = {"endpoint": side.listener.endpoint, "ticket": side.ticket}
    return {name: msgspec.to_builtins(value) for name, value in names.items()}


def receive(transport: str, host: str, layers: int) -> None:
    """The receiving process."""
    if transport == "sockets":
        receive_sockets(host)
        return
    side = Receiving(transport, host, layers)
    tell(**told(side))
    for order in orders():
        if "open" in order:
            side.open(order["open"], order["tokens"])
            cpu = time.process_time()
            tell(opened=True)
        else:
            complete, caches = side.caches()
            built, cpu = time.monotonic(), time.process_time() - cpu
            if order["verify"]:
                side.verify(caches)
            del caches
            side.end()
            tell(complete=complete, built=built, cpu=cpu)
    side.listener.close()


def receive_sockets(host: str) -> None:
    """The floor: messages into one buffer."""
    server = socket.create_server((host, 0))
    endpoint = {"transport": "sockets", "host": host, "port": server.getsockname()[1]}
    tell(endpoint=endpoint, ticket=None)
    sock, _ = server.accept()
    tune(sock)
    buffer = memoryview(bytearray(MESSAGE))
    for order in orders():
        if "open" in order:
            cpu = time.process_time()
            tell(opened=True)
            for _ in range(order["messages"]):
                if sock.recv_into(buffer, MESSAGE, socket.MSG_WAITALL) != MESSAGE:
                    raise RuntimeError("the sender is gone")
            end, cpu = time.monotonic(), time.process_time() - cpu
        else:
            tell(complete=end, built=end, cpu=cpu)


# --- the sending process --------------------------------------------------------------------


def send(layers: int, tokens: int, frame_bytes: int) -> None:
    """The sending process: attaches, then sends a whole cache, layer by layer."""
    planes: list[list[np.ndarray[Any, Any]]] = []
    sender: Any = None
    sock: socket.socket | None = None
    checked = False
    for order in orders():
        if "connect" in order:
            endpoint = msgspec.convert(order["connect"], Endpoint)
            name = order["name"]
            checked = name.endswith(CHECKED)
            if endpoint.transport == "sockets":
                sock = socket.create_connection((endpoint.host, endpoint.port))
                tune(sock)
            else:
                planes = [[plane_data(i, p, tokens) for p in range(2)] for i in range(layers)]
                ticket = msgspec.convert(order["ticket"], DataTicket)
                sender = transport_of(name).connect(endpoint, ticket, 30.0)
            tell(connected=True)
        elif sock is not None:
            message = memoryview(bytearray(MESSAGE))
            start, cpu = time.monotonic(), time.process_time()
            for _ in range(order["messages"]):
                sock.sendall(message)
            tell(start=start, cpu=time.process_time() - cpu)
        else:
            session = order["send"]
            sender.send(Header(kind=Kind.ATTACH, session=session, payload_bytes=0))
            while not sender.replies():
                time.sleep(0.001)
            frames = list(cut(session, planes, frame_bytes))
            start, cpu = time.monotonic(), time.process_time()
            for header, payload in frames:
                if checked:
                    header = replace(header, checksum=checksum(payload))
                sender.send(header, payload)
            cpu_sent = time.process_time() - cpu
            flush(sender)
            tell(start=start, cpu=time.process_time() - cpu, cpu_sent=cpu_sent)
    if sender is not None:
        sender.close()


def flush(sender: Any) -> None:
    """Let a transport with threads of its own finish, so that its CPU time is counted."""
    wait = getattr(sender, "flush", None)
    if wait is not None:
        wait()


def cut(
    session: int, planes: list[list[np.ndarray[Any, Any]]], frame_bytes: int
) -> Iterator[tuple[Header, list[memoryview]]]:
    """The frames of a cache: all heads of as many tokens as fit, K then V, layer by layer."""
    step = max(1, frame_bytes // (HEADS * HEAD_DIM * ITEM))
    for layer, pair in enumerate(planes):
        tokens = pair[0].shape[1]
        for low in range(0, tokens, step):
            high = min(low + step, tokens)
            for plane in range(2):
                rows = [memoryview(head[low:high]).cast("B") for head in pair[plane]]
                header = Header(
                    kind=Kind.BLOCK,
                    session=session,
                    payload_bytes=sum(row.nbytes for row in rows),
                    layer=layer,
                    part=plane,
                    dtype="bfloat16",
                    heads=HEADS,
                    width=HEAD_DIM,
                    token_start=low,
                    tokens=high - low,
                )
                yield header, rows


# --- measuring ------------------------------------------------------------------------------


def memcpy_floor(nbytes: int, repeats: int) -> float:
    """GB/s of one thread's copy between two arrays that exist already."""
    source = np.ones(nbytes, np.uint8)
    target = np.zeros(nbytes, np.uint8)
    seconds = []
    for _ in range(max(3, repeats)):
        began = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - began)
    return nbytes / statistics.median(seconds) / 1e9


def measure(places: tuple[Place, Place], name: str, options: Any) -> dict[str, Any]:
    """One row: a transport over a link, ``options.repeats`` times."""
    spark, mac = places
    layers, tokens = options.layers, options.tokens
    nbytes = 2 * layers * HEADS * tokens * HEAD_DIM * ITEM
    messages = -(-nbytes // MESSAGE)
    if name == "sockets":
        nbytes = messages * MESSAGE
    me = ("-m", "bench.transport")
    frame = str(options.frame_kib << 10)
    runs = []
    with (
        Child(mac, *me, "--role", "receive", name, mac.address, str(layers)) as receiver,
        Child(spark, *me, "--role", "send", str(layers), str(tokens), frame) as sender,
    ):
        ready = receiver.answer()
        sender.ask(connect=ready["endpoint"], ticket=ready["ticket"], name=name)
        for number in range(1, options.repeats + 1):
            receiver.ask(open=number, tokens=tokens, messages=messages)
            sent = sender.ask(send=number, messages=messages)
            done = receiver.ask(finish=number, verify=not options.no_verify)
            seconds = done["built"] - sent["start"]
            gb = nbytes / 1e9
            runs.append(
                {
                    "seconds": seconds,
                    "gb_per_s": gb / seconds,
                    "build_ms": 1e3 * (done["built"] - done["complete"]),
                    "cpu_s_per_gb_sender": sent["cpu"] / gb,
                    "cpu_s_per_gb_receiver": done["cpu"] / gb,
                }
            )
    row: dict[str, Any] = {"transport": name, "bytes": nbytes, "runs": runs}
    for key in runs[0]:
        row[key] = statistics.median(run[key] for run in runs)
    row["verified"] = name != "sockets" and not options.no_verify
    row["cpu_s_per_gb_both"] = statistics.median(
        run["cpu_s_per_gb_sender"] + run["cpu_s_per_gb_receiver"] for run in runs
    )
    return row


def show(result: dict[str, Any], console: Console) -> None:
    """The table."""
    floor = result["floors"]["memcpy_gb_per_s"]
    table = Table(title=f"{result['bytes'] / 1e9:.2f} GB into finished MLX caches")
    for column in ("link", "transport", "GB/s", "of limit", "CPU-s/GB send", "receive", "both"):
        table.add_column(column, justify="left" if column in ("link", "transport") else "right")
    for link, rows in result["links"].items():
        limit = LINK_10G / 1e9 if link != "loopback" else floor
        for row in rows:
            table.add_row(
                link,
                "plain sockets" if row["transport"] == "sockets" else row["transport"],
                f"{row['gb_per_s']:.2f}",
                f"{100 * row['gb_per_s'] / limit:.0f}%",
                f"{row['cpu_s_per_gb_sender']:.2f}",
                f"{row['cpu_s_per_gb_receiver']:.2f}",
                f"{row['cpu_s_per_gb_both']:.2f}",
            )
    console.print(table)
    console.print(
        f"Limits: memcpy {floor:.1f} GB/s (loopback), 10 Gbit {LINK_10G / 1e9:.2f} GB/s (link)"
    )
    for link, why in result["skipped"].items():
        console.print(f"Skipped {link}: {why}")


def available() -> list[str]:
    """The transports that are installed, ``tcp`` first and in each of its variants."""
    variants = [f"tcp+{variant}" for variant in (CHECKED, *LEVELS)]
    return ["tcp", *variants, *sorted(plugins.transports().keys() - {"tcp"})]


def main() -> None:
    """Measure, print, and write JSON."""
    if sys.argv[1:2] == ["--role"]:
        role, *arguments = sys.argv[2:]
        if role == "receive":
            receive(arguments[0], arguments[1], int(arguments[2]))
        else:
            send(*map(int, arguments))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transports", nargs="+", default=available(), choices=available())
    parser.add_argument("--links", nargs="+", default=["loopback", "10gbit"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--frame-kib", type=int, default=2048, help="payload of one frame")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "transport.json")
    options = parser.parse_args()

    # Between processes of one host UCX would find shared memory, through namespaces too.
    os.environ.setdefault("UCX_TLS", "tcp")
    console = Console(stderr=True)
    nbytes = 2 * options.layers * HEADS * options.tokens * HEAD_DIM * ITEM
    result: dict[str, Any] = record("data transports into finished MLX caches") | {
        "bytes": nbytes,
        "layers": options.layers,
        "tokens": options.tokens,
        "frame_kib": options.frame_kib,
        "ucx_tls": os.environ["UCX_TLS"],
        "floors": {
            "memcpy_gb_per_s": memcpy_floor(nbytes, options.repeats),
            "link_10gbit_gb_per_s": LINK_10G / 1e9,
        },
        "links": {},
        "skipped": {},
    }
    for link in options.links:
        try:
            with contextlib.ExitStack() as stack:
                places = LOOPBACK
                if link != "loopback":
                    places = stack.enter_context(shaped_link(rate=link))
                for transport in ["sockets", *options.transports]:
                    with console.status(f"{transport} over {link}"):
                        row = measure(places, transport, options)
                    result["links"].setdefault(link, []).append(row)
        except NoRights as error:
            result["skipped"][link] = str(error)
    save(result, options.out)
    show(result, console)
    console.print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
