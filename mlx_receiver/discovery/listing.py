"""Receivers on the network as a table or as JSON, for the command lines of both sides."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any, Final

import msgspec

from mlx_receiver.discovery.browse import Found, discover
from mlx_receiver.discovery.service import why_not
from mlx_receiver.wire.addresses import spelled
from mlx_receiver.wire.messages import PROTOCOL_VERSION

HINT: Final = (
    "No receiver was found. Does one run on this network (`mlx-receiver start`)? Discovery needs "
    "multicast DNS: a firewall must let UDP port 5353 through on both machines; guest Wi-Fi, VPNs "
    "and some switches carry no multicast. Without it, give vLLM the receiver's address with "
    "--mac-decode-receiver HOST:PORT."
)


def list_receivers(
    seconds: float, as_json: bool, model: str = "", known: Collection[str] | None = None
) -> int:
    """Look for receivers and print them; the exit status: 0 if there are any, else 1.

    ``model`` is the one that is wanted, "" for any; ``known`` as in ``why_not``.
    """
    from rich.console import Console

    errors = Console(stderr=True, highlight=False)
    with errors.status(f"Listening for {seconds:g} s"):
        found = discover(seconds)
    if as_json:
        print(json.dumps({"receivers": [as_dict(one, model, known) for one in found]}, indent=1))
    elif found:
        Console(highlight=False).print(table(found, model, known))
    if not found:
        errors.print(HINT, soft_wrap=True)
    return 0 if found else 1


def table(found: Sequence[Found], model: str, known: Collection[str] | None = None) -> Any:
    """A ``rich`` table of them."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title="Receivers")
    for heading in ("name", "model", "paired", "protocol", "addresses", "use"):
        shown.add_column(heading, overflow="fold")
    for one in found:
        said = one.announced
        reason = why_not(said, model, PROTOCOL_VERSION, known)
        shown.add_row(
            escape(said.name),
            escape(said.model),
            "yes" if said.paired else "no",
            str(said.protocol),
            "\n".join(
                escape(f"{spelled(way.host, one.port)} ({way.interface}, {way.kind})")
                for way in one.addresses
            ),
            f"[yellow]{escape(reason)}[/]" if reason else "[green]matches[/]",
        )
    return shown


def as_dict(one: Found, model: str, known: Collection[str] | None = None) -> dict[str, Any]:
    """One of them for JSON."""
    reason = why_not(one.announced, model, PROTOCOL_VERSION, known)
    return {
        **msgspec.structs.asdict(one.announced),
        "port": one.port,
        "addresses": [
            {"host": way.host, "interface": way.interface, "kind": way.kind}
            for way in one.addresses
        ],
        "matches": not reason,
        "why_not": reason,
    }
