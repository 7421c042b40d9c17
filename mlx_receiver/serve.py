"""A receiver's life as a process: start, serve, end, and listen to signals all the while."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from threading import Thread
from typing import TYPE_CHECKING, Final, NoReturn

import msgspec

from mlx_receiver.decode.blas import use_fast_blas
from mlx_receiver.decode.model import ModelError
from mlx_receiver.settings import Settings
from mlx_receiver.wire.messages import E_MODEL, WireError

if TYPE_CHECKING:
    from rich.console import Console

    from mlx_receiver.control.lobby import Choose
    from mlx_receiver.decode.model import Progress
    from mlx_receiver.receiver import Receiver

logger = logging.getLogger(__name__)

#: How often progress is logged where there is no terminal to draw it on.
_PROGRESS_SECONDS: Final = 10.0

#: How often somebody's wish for another model is looked for, how long after the wish its answer may
#: take to go out, and how long a model that cannot be loaded is not tried again.
_LOOK_SECONDS: Final = 0.2
_LAST_WORDS: Final = 0.1
_AGAIN_SECONDS: Final = 60.0

_CAFFEINATE: Final = "/usr/bin/caffeinate"


class Interruption:
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


def serve(settings: Settings, stop: Interruption) -> NoReturn:
    """Serve until the interruption, and end the process.

    Without a model in the settings: wait for the first vLLM, and serve what that one serves; the
    next one may want another. Raises SettingsError or ModelError when it cannot.
    """
    from rich.console import Console

    from mlx_receiver.decode.choice import choose, parse_map

    parse_map(settings.model_map)  # raises
    console = Console(stderr=True, highlight=False)
    unusable: dict[str, tuple[str, float]] = {}

    def chosen(asked: str) -> str:
        found = choose(settings, asked)
        why, until = unusable.get(found, ("", 0.0))
        if time.monotonic() < until:
            raise WireError(E_MODEL, f"this receiver cannot serve {found}: {why}")
        return found

    choice = None if settings.model else chosen
    model: str | None = settings.model
    while True:
        if choice is not None and not model:
            model = _asked(settings, choice, console, stop)
            if model is None:
                _leave(console)
        try:
            loading = msgspec.structs.replace(settings, model=model)
            model = _serve_model(loading, choice, console, stop)
        except ModelError as error:
            if choice is None:
                raise
            # The next vLLM may serve another one, and this one hears why.
            logger.error("%s", error)
            unusable[str(model)] = str(error), time.monotonic() + _AGAIN_SECONDS
            model = ""
        if model is None:
            _leave(console)


def _asked(settings: Settings, choice: Choose, console: Console, stop: Interruption) -> str | None:
    """The model that the first client serves, None when it was interrupted before."""
    from mlx_receiver.announcement import waiting
    from mlx_receiver.waiting import WaitingReceiver

    with WaitingReceiver(settings, choice) as receiver:
        for line in waiting(receiver):
            console.print(line, soft_wrap=True, markup=False)
        while not stop.wait(_LOOK_SECONDS):
            if receiver.presence is not None:
                receiver.presence.refresh()
            model = receiver.wait(0)
            if model is not None:
                time.sleep(_LAST_WORDS)
                return model
    return None


def _serve_model(
    settings: Settings, choice: Choose | None, console: Console, stop: Interruption
) -> str | None:
    """Serve that model; then the next one, None when it was interrupted.

    Raises SettingsError or ModelError.
    """
    from rich.progress import BarColumn, Progress, TextColumn

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
        receiver = _started(settings, show, choice, stop)
    if receiver is None:
        return None
    from mlx_receiver.announcement import announcement

    awake = _keep_awake()
    for line in announcement(receiver):
        console.print(line, soft_wrap=True, markup=False)
    if awake:
        console.print("This Mac stays awake meanwhile (caffeinate), unless its lid is closed.")
    while not receiver.control.wanted and not stop.wait(_LOOK_SECONDS):
        if receiver.presence is not None:
            receiver.presence.refresh()
    wanted = receiver.control.wanted
    receiver.stop()
    if not wanted:
        return None
    console.print(f"The next vLLM serves another model: loading {wanted}", soft_wrap=True)
    return wanted


def _leave(console: Console) -> NoReturn:
    """End at once: taking the imported libraries down one by one lasts seconds, and a download or
    MLX in the middle of loading do not listen at all."""
    console.print("Stopped.")
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _started(
    settings: Settings, progress: Progress, choice: Choose | None, stop: Interruption
) -> Receiver | None:
    """A receiver that is ready, None when it was interrupted before.

    Raises SettingsError or ModelError.
    """
    made: Future[Receiver] = Future()

    def make() -> None:
        try:
            use_fast_blas()
            from mlx_receiver.receiver import Receiver

            made.set_result(Receiver(settings, progress, choice))
        except BaseException as error:
            made.set_exception(error)

    # Importing MLX takes a while, and the hub as long as it likes.
    Thread(target=make, daemon=True).start()
    while not made.done():
        if stop.wait(0.05):
            return None
    receiver = made.result()
    try:
        receiver.start()
        while not receiver.wait_ready(0.1):
            if stop.wait(0):
                return None
    except BaseException:
        receiver.stop()
        raise
    return receiver


def _keep_awake() -> bool:
    """Have a Mac not fall asleep for want of a user while this process lives."""
    if sys.platform != "darwin":
        return False
    command = [_CAFFEINATE, "-i", "-w", str(os.getpid())]
    quiet = subprocess.DEVNULL
    try:
        # In a session of its own: Ctrl-C is for this process.
        subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    except OSError:
        return False
    return True
