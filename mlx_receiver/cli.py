"""The ``mlx-receiver`` command. Heavy libraries are imported only once there is work to do."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import traceback
from typing import Annotated, Any, NoReturn

import typer

from mlx_receiver import __version__
from mlx_receiver.decode.blas import use_fast_blas
from mlx_receiver.discovery import cli as discovery
from mlx_receiver.options import command, typed
from mlx_receiver.pairing import cli as pairing
from mlx_receiver.pairing.cli import with_keystore
from mlx_receiver.settings import ENV_PREFIX, Settings, SettingsError, check_dtype, check_ports

app = command(
    "mlx-receiver", __version__, "Continue on MLX the requests that vLLM has prefilled elsewhere."
)


@app.command()
@typed(Settings, ENV_PREFIX)
def start(
    log_level: Annotated[
        str, typer.Option(envvar="MLX_RECEIVER_LOG_LEVEL", help="debug, info, warning or error.")
    ] = "info",
    **options: Any,
) -> None:
    """Serve a model until interrupted."""
    from mlx_receiver.decode.model import ModelError
    from mlx_receiver.interfaces import check_host
    from mlx_receiver.serve import Interruption, serve

    _configure_logging(log_level)
    stop = Interruption()
    try:
        settings = Settings.typed(options)
        check_host(settings.host)
        serve(settings, stop)
    except (SettingsError, ModelError) as error:
        _give_up(error)


@app.command()
@typed(Settings, ENV_PREFIX, "model", "port", "data_port", "http_port", model="")
def check(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    *,
    model: str,
    port: int,
    data_port: int,
    http_port: int,
) -> None:
    """Say whether this machine is ready to decode, and what to type on the other one.

    Exit status: 0 if nothing is wrong, 1 if something is, 2 for options that cannot be used.
    """
    from mlx_receiver.checks.report import Report, run_and_print

    try:
        check_ports(port, data_port, None if http_port < 0 else http_port)
    except SettingsError as error:
        _give_up(error)
    raise typer.Exit(run_and_print(Report(model, port, data_port, http_port), as_json))


@app.command()
def pair() -> None:
    """Show a one-time code with which a vLLM machine becomes this receiver's; then `mac-decode pair
    CODE` there. Exit status: 0 once it is paired, 1 if nobody used the code."""
    from mlx_receiver.pairing.commands import show_code

    with_keystore("receiver", _give_up, show_code)


@app.command()
@typed(Settings, ENV_PREFIX, "model", "dtype", "max_batch")
def profile(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    *,
    model: str,
    dtype: str,
    max_batch: int,
) -> None:
    """Measure how fast this machine is with a model, and keep that for the receiver.

    A receiver does the same while nothing is decoded; stop it meanwhile. Exit status: 0 once it is
    measured, 1 if there was no room, 2 for options that cannot be used.
    """
    use_fast_blas()
    from mlx_receiver.checks.speed import run_and_print
    from mlx_receiver.decode.model import ModelError

    try:
        if not model:
            raise SettingsError("--model names the model that is to be measured")
        check_dtype(dtype)
        if max_batch < 1:
            raise SettingsError("--max-batch must be at least 1")
        status = run_and_print(model, dtype, max_batch, as_json)
    except (ModelError, SettingsError) as error:
        _give_up(error)
    raise typer.Exit(status)


@app.command()
@typed(Settings, ENV_PREFIX, "model", "dtype")
def generate(
    token_ids: Annotated[str, typer.Option(help="Prompt token ids, separated by commas.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    *,
    model: str,
    dtype: str,
) -> None:
    """Prefill and decode one prompt greedily on MLX alone: the reference for a hand-off."""
    use_fast_blas()
    from mlx_receiver.decode.engine import DecodeEngine
    from mlx_receiver.decode.local import generate_tokens
    from mlx_receiver.decode.model import ModelError, find_model
    from mlx_receiver.wire.messages import WireError
    from mlx_receiver.wire.sampling import Sampling

    try:
        prompt = [int(part) for part in token_ids.split(",")]
    except ValueError:
        _give_up(SettingsError(f"--token-ids {token_ids!r} is not a list of numbers"))
    try:
        check_dtype(dtype)
        engine = DecodeEngine(find_model(model), dtype=dtype, max_batch=1)
        engine.start()
        loaded = engine.wait_loaded()
        assert loaded is not None
        began = time.perf_counter()
        tokens = generate_tokens(engine, prompt, Sampling(max_tokens=max_tokens, temperature=0.0))
        seconds = time.perf_counter() - began
        engine.stop()
    except (ModelError, SettingsError, WireError) as error:
        _give_up(error)
    if as_json:
        result = {
            "model": model,
            "dtype": loaded.dtype,
            "token_ids": tokens,
            "seconds": round(seconds, 4),
        }
        typer.echo(json.dumps(result))
    else:
        typer.echo(",".join(map(str, tokens)))


def _configure_logging(level: str) -> None:
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        _give_up(SettingsError(f"--log-level {level} is not one of debug, info, warning, error"))
    logging.basicConfig(level=number, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if number > logging.DEBUG:
        for library in ("httpx", "httpx2"):  # a line for each request, to the hub, say
            logging.getLogger(library).setLevel(max(number, logging.WARNING))


def _give_up(error: Exception | str) -> NoReturn:
    typer.echo(f"mlx-receiver: {error}", err=True)
    raise typer.Exit(2)


discovery.add_command(app, lambda: None)
pairing.add_commands(app, "receiver", "vLLM machines", ": it is disconnected at once", _give_up)


def main() -> NoReturn:
    """Run the command line, and end the process without C++'s static destructors.

    MLX's abort it with "terminate called without an active exception", in the place of its exit
    status, while a thread that has used MLX lives, or is not quite gone: ``Thread.join`` returns
    before the thread's own C++ objects are destroyed.
    """
    status: int | str | None = 1
    try:
        app()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    main()
