"""``mac-decode pair``: which receiver is meant, and the visit to it."""

from __future__ import annotations

from rich.console import Console

from mlx_receiver.discovery.browse import Found, discover
from mlx_receiver.pairing.keystore import Keystore, PairingError, Peer
from mlx_receiver.pairing.visit import Unreachable, pair
from mlx_receiver.wire.seldom import printable
from vllm_mac_decode.settings import parse_address

#: Seconds in which receivers may answer.
_LOOK_SECONDS = 3.0


def pair_with(keystore: Keystore, receiver: str, http_port: int, code: str) -> int:
    """Pair with the receiver of that name or address, or with the one that is found.

    Raises PairingError.
    """
    console = Console(highlight=False)
    found = [] if _is_address(receiver) else _found(console)
    chosen = [s for s in found if receiver in ("", s.announced.name, s.announced.instance)]
    if not receiver and len(chosen) > 1:
        known = {peer.key for peer in keystore.peers()}
        chosen = [service for service in chosen if service.announced.key not in known] or chosen
    if len(chosen) > 1:
        names = ", ".join(f"{printable(s.announced.name)} ({s.announced.instance})" for s in chosen)
        raise PairingError(f"several receivers are found: {names}. Name one with --receiver")
    if chosen:
        peer = _visit(keystore, chosen[0], code)
    elif receiver:
        try:
            host, port = parse_address(receiver)
        except ValueError as error:
            raise PairingError(str(error)) from None
        peer = pair(keystore, host, port, http_port, code)
    else:
        raise PairingError(
            "no receiver is found on this network: name its address with --receiver HOST[:PORT]"
        )
    console.print(
        f"Paired with {printable(peer.name)} ({peer.instance}). Now:  vllm serve MODEL "
        "--kv-connector mac_decode",
        markup=False,
        soft_wrap=True,
    )
    return 0


def _found(console: Console) -> list[Found]:
    with console.status("Looking for receivers"):
        return discover(_LOOK_SECONDS)


def _visit(keystore: Keystore, service: Found, code: str) -> Peer:
    """The first of its addresses that answers. Raises PairingError."""
    if not service.announced.http_port:
        raise PairingError(
            f"{printable(service.announced.name)} has no HTTP port, which pairing needs"
        )
    failures = []
    for address in service.addresses:
        try:
            return pair(keystore, address.host, service.port, service.announced.http_port, code)
        except Unreachable as error:
            failures.append(str(error))
    raise PairingError("; ".join(failures) or "the receiver has no address")


def _is_address(receiver: str) -> bool:
    """Whether that can be no name of a receiver's."""
    return ":" in receiver or receiver.replace(".", "").isdigit()
