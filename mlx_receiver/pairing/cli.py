"""The commands that both sides have for their pairings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from mlx_receiver.pairing.keystore import Keystore, Side


def with_keystore(
    side: Side, give_up: Callable[[str], NoReturn], command: Callable[[Keystore], int]
) -> NoReturn:
    """End with the exit status of a command; ``give_up`` says why one cannot be done."""
    from mlx_receiver.pairing.keystore import Keystore, PairingError

    try:
        status = command(Keystore(side))
    except PairingError as error:
        give_up(str(error))
    raise typer.Exit(status)


def add_commands(
    app: typer.Typer, side: Side, others: str, then: str, give_up: Callable[[str], NoReturn]
) -> None:
    """Add ``pairings`` and ``unpair``; ``others`` are the machines of the other side, and ``then``
    is what becomes of one that is forgotten."""

    @app.command(help=f"List the {others} that are paired with this machine.")
    def pairings() -> None:
        from mlx_receiver.pairing.commands import list_pairings

        with_keystore(side, give_up, list_pairings)

    @app.command(help=f"Forget one of the {others}{then}.")
    def unpair(
        name: Annotated[str, typer.Argument(help="Its name or id, as listed; * for all.")],
    ) -> None:
        from mlx_receiver.pairing import commands

        with_keystore(side, give_up, lambda keystore: commands.unpair(keystore, name))
