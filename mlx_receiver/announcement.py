"""What a receiver says once it serves: where, and what to type on the vLLM machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from mlx_receiver.interfaces import Interface, interfaces, reachable_at
from mlx_receiver.settings import Settings, is_loopback
from mlx_receiver.wire.addresses import spelled

if TYPE_CHECKING:
    from mlx_receiver.decode.model import ModelSource
    from mlx_receiver.receiver import Receiver

#: The prompt whose transfer times are named, in tokens.
_EXAMPLE_TOKENS: Final = 8192
#: What Wi-Fi carries in a good and in an ordinary room, in bit/s.
_WIFI: Final = (0.8e9, 0.2e9)

OPEN_UP: Final = (
    '--host 0.0.0.0 --token "$(openssl rand -hex 16)" --api-key "$(openssl rand -hex 16)"'
)


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
        f"KV memory {budget / 2**30:.2f} GiB, {budget // per_token:,} tokens, up to "
        f"{settings.max_sessions} sessions, {settings.max_batch} of them decoding",
    ]
    for address, interface in places:
        on = f" ({interface.text})" if interface is not None else ""
        lines.append(f"Listening on {spelled(address, receiver.port)}{on}")
    lines[-1] += f"; KV comes to port {ports}"
    best, interface = places[0]
    if receiver.http is not None:
        base = f"http://{spelled(best, receiver.http.port)}"
        lines.append(f"OpenAI API on {base}/v1, health and metrics on {base}/health")
        if settings.prefill:
            lines.append(
                f"Prompts of {settings.prefill_min_tokens} tokens and more are prefilled by "
                f"{settings.prefill}"
            )
    if interface is not None and interface.kind == "wifi":
        lines.append(wifi_warning(interface, per_token))
    lines += [
        "On the vLLM machine:",
        *other_side(settings, source, best, receiver.port),
    ]
    if is_loopback(settings.host):
        lines.append(f"Only this machine can connect. For another one: {OPEN_UP}")
    return lines


def other_side(settings: Settings, source: ModelSource, address: str, port: int) -> Sequence[str]:
    """The command that starts vLLM with this receiver."""
    token = "MAC_DECODE_TOKEN=... " if settings.token else ""
    name = source.vllm_name
    if name is None and is_loopback(settings.host) and "quantization" not in source.config:
        name = source.name
    lines = [
        f"  {token}MAC_DECODE_RECEIVER={spelled(address, port)} \\",
        f"    vllm serve {name or 'MODEL'} --kv-connector mac_decode",
    ]
    if name is None:
        lines.append(f"  (MODEL is what vLLM calls the model of {source.name})")
    return lines


def wifi_warning(interface: Interface, bytes_per_token: int) -> str:
    """How long a prompt's KV takes by radio."""
    bits = 8 * _EXAMPLE_TOKENS * bytes_per_token
    best, usual = (bits / rate for rate in _WIFI)
    return (
        f"{interface.name} is Wi-Fi, which is slow for this: the KV of {_EXAMPLE_TOKENS:,} tokens "
        f"({bits / 8e9:.2f} GB) takes some {best:.0f} to {usual:.0f} s, {bits / 1e10:.1f} s on a "
        "10 Gbit/s cable"
    )
