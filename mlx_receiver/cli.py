"""The ``mlx-receiver`` command. Heavy libraries are imported only once there is work to do."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import traceback
from typing import Annotated, NoReturn

import typer

from mlx_receiver import __version__
from mlx_receiver.decode.blas import use_fast_blas
from mlx_receiver.settings import Settings, SettingsError, check_ports, parse_bytes

app = typer.Typer(
    help="Continue on MLX the requests that vLLM has prefilled elsewhere.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mlx-receiver {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


_Model = Annotated[
    str,
    typer.Option("--model", envvar="MLX_RECEIVER_MODEL", help="A model folder or Hugging Face id."),
]
_Dtype = Annotated[
    str,
    typer.Option(
        envvar="MLX_RECEIVER_DTYPE",
        help="Cast the weights: auto (as stored), bfloat16, float16 or float32.",
    ),
]

_Port = Annotated[
    int, typer.Option(envvar="MLX_RECEIVER_PORT", help="Control port, the one vLLM is told.")
]
_DataPort = Annotated[
    int, typer.Option(envvar="MLX_RECEIVER_DATA_PORT", help="Port for KV blocks; 0: any.")
]
_HttpPort = Annotated[
    int,
    typer.Option(envvar="MLX_RECEIVER_HTTP_PORT", help="OpenAI API, health, metrics; -1: no HTTP."),
]


@app.command()
def start(
    model: _Model,
    host: Annotated[
        str,
        typer.Option(envvar="MLX_RECEIVER_HOST", help="Address to listen on; others need a token."),
    ] = "127.0.0.1",
    port: _Port = 7790,
    data_port: _DataPort = 0,
    transport: Annotated[
        str,
        typer.Option(
            envvar="MLX_RECEIVER_TRANSPORT",
            help="Bulk transports to offer, e.g. tcp,zmq (nixl where it is installed).",
        ),
    ] = "tcp",
    http_port: _HttpPort = 7791,
    token: Annotated[
        str,
        typer.Option(
            envvar="MAC_DECODE_TOKEN",
            help="Shared secret that clients must show.",
            show_default=False,
        ),
    ] = "",
    api_key: Annotated[
        str,
        typer.Option(
            envvar="MLX_RECEIVER_API_KEY",
            help="Key that clients of the OpenAI API must send.",
            show_default=False,
        ),
    ] = "",
    allowed_hosts: Annotated[
        str,
        typer.Option(
            envvar="MLX_RECEIVER_ALLOWED_HOSTS",
            help="Names of this machine that HTTP clients may use besides its addresses, localhost "
            "and *.local, separated by commas.",
            show_default=False,
        ),
    ] = "",
    served_model_name: Annotated[
        str,
        typer.Option(
            envvar="MLX_RECEIVER_SERVED_MODEL_NAME",
            help="The model's name in the OpenAI API, if not that of --model.",
            show_default=False,
        ),
    ] = "",
    prefill: Annotated[
        str,
        typer.Option(
            envvar="MLX_RECEIVER_PREFILL",
            help="Front door: the URL of a vLLM with mac_decode that prefills long prompts.",
            show_default=False,
        ),
    ] = "",
    prefill_min_tokens: Annotated[
        int,
        typer.Option(
            envvar="MLX_RECEIVER_PREFILL_MIN_TOKENS", help="Shorter prompts are prefilled here."
        ),
    ] = 512,
    prefill_timeout: Annotated[
        float,
        typer.Option(
            envvar="MLX_RECEIVER_PREFILL_TIMEOUT",
            help="Seconds after which a prompt is prefilled here after all.",
        ),
    ] = 60.0,
    prefill_api_key: Annotated[
        str,
        typer.Option(
            envvar="MLX_RECEIVER_PREFILL_API_KEY",
            help="The API key of that vLLM.",
            show_default=False,
        ),
    ] = "",
    dtype: _Dtype = "auto",
    kv_memory: Annotated[
        str,
        typer.Option(
            envvar="MLX_RECEIVER_KV_MEMORY",
            help="Memory for received KV, e.g. 24GB; auto: a share of what the model leaves.",
        ),
    ] = "auto",
    max_sessions: Annotated[
        int, typer.Option(envvar="MLX_RECEIVER_MAX_SESSIONS", help="Sessions open at once.")
    ] = 64,
    max_batch: Annotated[
        int, typer.Option(envvar="MLX_RECEIVER_MAX_BATCH", help="Sessions decoded at once.")
    ] = 32,
    log_level: Annotated[
        str, typer.Option(envvar="MLX_RECEIVER_LOG_LEVEL", help="debug, info, warning or error.")
    ] = "info",
) -> None:
    """Serve a model until interrupted."""
    from mlx_receiver.decode.model import ModelError
    from mlx_receiver.interfaces import check_host
    from mlx_receiver.serve import Interruption, serve

    _configure_logging(log_level)
    stop = Interruption()
    try:
        settings = Settings(
            model=model,
            host=host,
            port=port,
            data_port=data_port,
            http_port=None if http_port < 0 else http_port,
            token=token,
            api_key=api_key,
            allowed_hosts=allowed_hosts,
            served_model_name=served_model_name,
            prefill=prefill,
            prefill_min_tokens=prefill_min_tokens,
            prefill_timeout=prefill_timeout,
            prefill_api_key=prefill_api_key,
            dtype=_checked_dtype(dtype),
            kv_memory=None if kv_memory == "auto" else parse_bytes(kv_memory),
            max_sessions=max_sessions,
            max_batch=max_batch,
            transport=transport,
        )
        settings.check()
        check_host(host)
        serve(settings, stop)
    except (SettingsError, ModelError) as error:
        _give_up(error)


@app.command()
def check(
    model: Annotated[
        str,
        typer.Option(
            envvar="MLX_RECEIVER_MODEL",
            help="The model to be served: its size, and its tokens once its weights are here.",
            show_default=False,
        ),
    ] = "",
    port: _Port = 7790,
    data_port: _DataPort = 0,
    http_port: _HttpPort = 7791,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
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
def generate(
    model: _Model,
    token_ids: Annotated[str, typer.Option(help="Prompt token ids, separated by commas.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 16,
    dtype: _Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Prefill and decode one prompt greedily on MLX alone: the reference for a hand-off."""
    use_fast_blas()
    from mlx_receiver.decode.engine import DecodeEngine
    from mlx_receiver.decode.local import generate_tokens
    from mlx_receiver.decode.model import ModelError, find_model
    from mlx_receiver.wire.messages import Sampling, WireError

    try:
        prompt = [int(part) for part in token_ids.split(",")]
    except ValueError:
        _give_up(SettingsError(f"--token-ids {token_ids!r} is not a list of numbers"))
    try:
        engine = DecodeEngine(find_model(model), dtype=_checked_dtype(dtype), max_batch=1)
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


def _checked_dtype(dtype: str) -> str:
    from mlx_receiver.decode.model import DTYPE_CHOICES

    if dtype not in DTYPE_CHOICES:
        raise SettingsError(f"--dtype {dtype} is not one of {', '.join(DTYPE_CHOICES)}")
    return dtype


def _configure_logging(level: str) -> None:
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        _give_up(SettingsError(f"--log-level {level} is not one of debug, info, warning, error"))
    logging.basicConfig(level=number, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if number > logging.DEBUG:
        for library in ("httpx", "httpx2"):  # a line for each request, to the hub, say
            logging.getLogger(library).setLevel(max(number, logging.WARNING))


def _give_up(error: Exception) -> NoReturn:
    typer.echo(f"mlx-receiver: {error}", err=True)
    raise typer.Exit(2)


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
