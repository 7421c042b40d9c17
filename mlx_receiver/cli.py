"""The ``mlx-receiver`` command. Heavy libraries are imported only once there is work to do."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import Future
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from mlx_receiver import __version__
from mlx_receiver.blas import use_fast_blas
from mlx_receiver.settings import Settings, SettingsError, parse_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from mlx_receiver.model import Progress
    from mlx_receiver.receiver import Receiver

logger = logging.getLogger(__name__)

#: Open files that a receiver may have; macOS allows no process more than 10,240.
_FILES: Final = 8192

#: How often progress is logged where there is no terminal to draw it on.
_PROGRESS_SECONDS: Final = 10.0

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


@app.command()
def start(
    model: _Model,
    host: Annotated[
        str,
        typer.Option(envvar="MLX_RECEIVER_HOST", help="Address to listen on; others need a token."),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="MLX_RECEIVER_PORT", help="Control port, the one vLLM is told.")
    ] = 7790,
    data_port: Annotated[
        int, typer.Option(envvar="MLX_RECEIVER_DATA_PORT", help="Port for KV blocks; 0: any.")
    ] = 0,
    transport: Annotated[
        str,
        typer.Option(
            envvar="MLX_RECEIVER_TRANSPORT",
            help="Bulk transports to offer, e.g. tcp,zmq (nixl where it is installed).",
        ),
    ] = "tcp",
    http_port: Annotated[
        int,
        typer.Option(
            envvar="MLX_RECEIVER_HTTP_PORT", help="OpenAI API, health, metrics; -1: no HTTP."
        ),
    ] = 7791,
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
    from mlx_receiver.interfaces import check_host

    _configure_logging(log_level)
    stop = _Interruption()
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
        _raise_file_limit()
        _serve(settings, stop)
    except SettingsError as error:
        _give_up(error)


class _Interruption:
    """SIGINT or SIGTERM, as something to wait for.

    A pipe, because setting a ``threading.Event`` in a handler deadlocks when the signal comes
    while the same thread holds the event's lock.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def wait(self, seconds: float | None) -> bool:
        """Whether a signal has come, after at most ``seconds``; None waits for it."""
        return bool(select.select([self._read], [], [], seconds)[0])

    def _note(self, *_: object) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, b"!")


def _serve(settings: Settings, stop: _Interruption) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(f"Looking up {settings.model}", total=None)
    said = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal said
        amount = f" ({done / 1e9:.1f} of {total / 1e9:.1f} GB)" if what == "Fetching" else ""
        text = f"{what} {settings.model}{amount}"
        bar.update(task, description=text, completed=done, total=total)
        if not console.is_terminal and time.monotonic() > said + _PROGRESS_SECONDS:
            said = time.monotonic()
            logger.info("%s, %d %%", text, 100 * done // total)

    with bar:
        receiver = _make_receiver(settings, show, stop)
        try:
            receiver.start()
            while not _ready(receiver):
                if stop.wait(0):
                    _leave(console)
        except BaseException:
            receiver.stop()
            raise
    from mlx_receiver.announcement import announcement

    awake = _keep_awake()
    for line in announcement(receiver):
        console.print(line, soft_wrap=True, markup=False)
    if awake:
        console.print("This Mac stays awake meanwhile (caffeinate), unless its lid is closed.")
    stop.wait(None)
    receiver.stop()
    _leave(console)


def _leave(console: Console) -> NoReturn:
    """End at once: taking the imported libraries down one by one lasts seconds, and a download or
    MLX in the middle of loading do not listen at all."""
    console.print("Stopped.")
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _make_receiver(settings: Settings, progress: Progress, stop: _Interruption) -> Receiver:
    use_fast_blas()
    from rich.console import Console

    from mlx_receiver.model import ModelError, ModelSource, find_model
    from mlx_receiver.receiver import Receiver

    # The hub may be slow to answer, and a signal is heard only where nobody waits for it.
    found: Future[ModelSource] = Future()

    def find() -> None:
        try:
            found.set_result(find_model(settings.model))
        except BaseException as error:
            found.set_exception(error)

    Thread(target=find, daemon=True).start()
    while not found.done():
        if stop.wait(0.05):
            _leave(Console(stderr=True))
    try:
        return Receiver(settings, progress, found.result())
    except ModelError as error:
        _give_up(error)


def _ready(receiver: Receiver) -> bool:
    from mlx_receiver.model import ModelError

    try:
        return receiver.wait_ready(0.1)
    except ModelError as error:
        receiver.stop()
        _give_up(error)


def _raise_file_limit() -> None:
    """Allow more than the 256 open files of macOS, which connections and a model soon take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _keep_awake() -> bool:
    """Have a Mac not fall asleep for want of a user while this process lives."""
    if sys.platform != "darwin":
        return False
    command = ["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())]
    quiet = subprocess.DEVNULL
    try:
        # In a session of its own: Ctrl-C is for this process.
        subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    except OSError:
        return False
    return True


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
    from mlx_receiver.engine import DecodeEngine
    from mlx_receiver.local import generate_tokens
    from mlx_receiver.model import ModelError, find_model
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
    from mlx_receiver.model import DTYPE_CHOICES

    if dtype not in DTYPE_CHOICES:
        raise SettingsError(f"--dtype {dtype} is not one of {', '.join(DTYPE_CHOICES)}")
    return dtype


def _configure_logging(level: str) -> None:
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        _give_up(SettingsError(f"--log-level {level} is not one of debug, info, warning, error"))
    logging.basicConfig(level=number, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


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
