"""What both command lines say of pairings. Each returns the exit status."""

from __future__ import annotations

import time
from datetime import datetime

from rich.console import Console
from rich.table import Table

from mlx_receiver.pairing.keystore import Keystore
from mlx_receiver.pairing.offer import new_offer, standing
from mlx_receiver.wire.seldom import printable


def list_pairings(keystore: Keystore) -> int:
    """Raises PairingError."""
    console = Console(highlight=False)
    me = keystore.identity()
    console.print(
        f"This machine is {me.instance}; its keys lie in {keystore.folder}", soft_wrap=True
    )
    peers = keystore.peers()
    if not peers:
        console.print("It is paired with nobody.")
        return 0
    table = Table("name", "id", "paired since", "address")
    for peer in peers:
        since = datetime.fromtimestamp(peer.since).astimezone().strftime("%Y-%m-%d %H:%M")
        table.add_row(printable(peer.name), peer.instance, since, printable(peer.address))
    console.print(table)
    return 0


def unpair(keystore: Keystore, name: str) -> int:
    """Forget those of that name or id. Raises PairingError."""
    console = Console(highlight=False)
    gone = keystore.remove(name)
    for peer in gone:
        console.print(f"Forgot {printable(peer.name)} ({peer.instance})", markup=False)
    if not gone:
        known = ", ".join(printable(p.name) for p in keystore.peers()) or "nobody"
        console.print(f"No pairing is called {printable(name)}: this machine knows {known}")
    return 0 if gone else 1


def show_code(keystore: Keystore) -> int:
    """Show a one-time code until a machine has used it; 1 when none did. Raises PairingError."""
    console = Console(highlight=False)
    before = {(peer.key, peer.since) for peer in keystore.peers()}
    offer = new_offer(keystore)
    console.print(f"On the vLLM machine:  mac-decode pair {offer.shown}")
    with console.status("") as status:
        while (left := offer.until - time.time()) > 0:
            gone = standing(keystore) is None
            for peer in keystore.peers():
                if (peer.key, peer.since) not in before:
                    console.print(f"Paired with {printable(peer.name)} ({peer.instance})")
                    return 0
            if gone:
                break
            status.update(f"waiting; the code counts for {left // 60:.0f}:{left % 60:02.0f}")
            time.sleep(0.2)
    console.print("The code does not count any more: nobody has used it, or wrong ones were tried.")
    return 1
