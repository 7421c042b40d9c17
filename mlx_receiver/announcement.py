"""What a receiver says once it serves: where, and what to type on the vLLM machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from mlx_receiver.interfaces import Interface, interfaces, reachable_at
from mlx_receiver.pairing.offer import new_offer
from mlx_receiver.settings import Settings, is_loopback
from mlx_receiver.wire.addresses import spelled
from mlx_receiver.wire.seldom import printable

if TYPE_CHECKING:
    from mlx_receiver.control.desk import Desk
    from mlx_receiver.decode.model import ModelSource
    from mlx_receiver.receiver import Receiver
    from mlx_receiver.waiting import WaitingReceiver

#: The prompt whose transfer times are named, in tokens.
_EXAMPLE_TOKENS: Final = 8192
#: What Wi-Fi carries in a good and in an ordinary room, in bit/s.
_WIFI: Final = (0.8e9, 0.2e9)


def waiting(receiver: WaitingReceiver) -> list[str]:
    """What it says while it waits for the first vLLM to say which model it serves."""
    settings = receiver.settings
    places = reachable_at(settings.host, interfaces()) or [("127.0.0.1", None)]
    best, _ = places[0]
    lines = [
        *listening_on(places, receiver.port),
        "No --model: this receiver loads what the first vLLM that connects serves.",
        "On the vLLM machine:",
    ]
    lines += pairing(receiver.desk, settings, receiver.http_port, best)
    return [*lines, serve_command(settings, best, receiver.port, "MODEL")]


def announcement(receiver: Receiver) -> list[str]:
    """Its lines."""
    settings, source, loaded = receiver.settings, receiver.source, receiver.engine.loaded
    assert loaded is not None
    per_token = loaded.cache.layout.bytes_per_token
    budget = receiver.store.budget_bytes
    found = interfaces()
    places = reachable_at(settings.host, found) or [("127.0.0.1", None)]
    ports = ", ".join(f"{e.port} ({e.transport})" for e in receiver.data_endpoints)
    lines = [
        f"Serving {source.name}: {source.signature.model_type}, {loaded.dtype}, "
        f"{loaded.nbytes / 2**30:.2f} GiB of weights",
        f"KV memory {budget / 2**30:.2f} GiB, {budget // max(1, per_token):,} tokens, up to "
        f"{settings.max_sessions} sessions, {settings.max_batch} of them decoding",
    ]
    lines += listening_on(places, receiver.port)
    lines[-1] += f"; KV comes to port {ports}"
    best, interface = places[0]
    if receiver.http is not None:
        alone = not settings.api_key
        base = f"http://{spelled('127.0.0.1' if alone else best, receiver.http.port)}"
        others = ", for this machine alone without --api-key" if alone and settings.pairs else ""
        lines.append(f"OpenAI API on {base}/v1, health and metrics on {base}/health{others}")
        if settings.prefill:
            lines.append(
                f"Prompts of {settings.prefill_min_tokens} tokens and more are prefilled by "
                f"{settings.prefill}"
            )
    if loaded.local:
        return [*lines, f"vLLM hands nothing off to this receiver: {loaded.local}"]
    if interface is not None and interface.kind == "wifi":
        lines.append(wifi_warning(interface, per_token))
    lines += [
        "On the vLLM machine:",
        *pairing(receiver.desk, settings, receiver.http_port, best),
        *other_side(settings, source, best, receiver.port),
    ]
    if is_loopback(settings.host):
        lines.append(
            f"Only this machine can connect. For another one: leave --host {settings.host} out"
        )
    return lines


def pairing(desk: Desk, settings: Settings, http_port: int, address: str) -> Sequence[str]:
    """With whom it is paired, or the command that pairs; nothing where nobody needs to."""
    if desk.reception is None:
        return ()
    peers = desk.keystore.peers()
    if peers:
        names = ", ".join(printable(peer.name) for peer in peers)
        return [f"  (paired with {names}; `mlx-receiver pair` adds another machine)"]
    if not http_port:
        return ["  (pairing needs HTTP: start without --http-port -1, or use --token)"]
    options = "" if settings.discovery else f" --receiver {address} --http-port {http_port}"
    code = new_offer(desk.keystore).shown
    return [f"  mac-decode pair {code}{options}      once, within 10 minutes"]


def other_side(settings: Settings, source: ModelSource, address: str, port: int) -> Sequence[str]:
    """The command that starts vLLM with this receiver."""
    name = source.vllm_name
    if name is None and is_loopback(settings.host) and "quantization" not in source.config:
        name = source.name
    lines = [serve_command(settings, address, port, name or "MODEL")]
    if name is None:
        lines.append(f"  (MODEL is what vLLM calls the model of {source.name})")
    return lines


def serve_command(settings: Settings, address: str, port: int, model: str) -> str:
    """What to type on the vLLM machine."""
    token = "MAC_DECODE_TOKEN=... " if settings.token else ""
    where = "" if settings.discovery else f"MAC_DECODE_RECEIVER={spelled(address, port)} "
    return f"  {token}{where}vllm serve {model} --kv-connector mac_decode"


def listening_on(places: Sequence[tuple[str, Interface | None]], port: int) -> list[str]:
    """A line for each address."""
    return [
        f"Listening on {spelled(address, port)}"
        + (f" ({interface.text})" if interface is not None else "")
        for address, interface in places
    ]


def wifi_warning(interface: Interface, bytes_per_token: int) -> str:
    """How long a prompt's KV takes by radio."""
    bits = 8 * _EXAMPLE_TOKENS * bytes_per_token
    best, usual = (bits / rate for rate in _WIFI)
    return (
        f"{interface.name} is Wi-Fi, which is slow for this: the KV of {_EXAMPLE_TOKENS:,} tokens "
        f"({bits / 8e9:.2f} GB) takes some {best:.0f} to {usual:.0f} s, {bits / 1e10:.1f} s on a "
        "10 Gbit/s cable"
    )
