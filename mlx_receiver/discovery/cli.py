"""The command ``discover``, which both sides have."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Annotated

import typer


def add_command(app: typer.Typer, known: Callable[[], Collection[str] | None]) -> None:
    """``known`` tells the keys of the receivers that take this machine, None where that is not
    asked."""

    @app.command()
    def discover(
        seconds: Annotated[
            float, typer.Option(min=0.1, max=600, help="How long to listen, in seconds.")
        ] = 3.0,
        model: Annotated[str, typer.Option(help="Say which receivers do not serve this one.")] = "",
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    ) -> None:
        """List the receivers that announce themselves on this network. Exit status: 0 if there are
        any, 1 if not."""
        from mlx_receiver.discovery.listing import list_receivers

        raise typer.Exit(list_receivers(seconds, as_json, model, known()))
