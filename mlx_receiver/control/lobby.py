"""The control port of a receiver without a model: it asks the first client which one to load."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Final

import zmq

from mlx_receiver.control.credentials import Credentials
from mlx_receiver.control.port import bind, open_port
from mlx_receiver.wire.codec import client_decoder, decode_client, encode
from mlx_receiver.wire.handshake import introduction
from mlx_receiver.wire.messages import (
    E_MODEL,
    E_PROTOCOL,
    Hello,
    Rejected,
    WireError,
    clipped,
)
from mlx_receiver.wire.seldom import Seldom, printable

logger = logging.getLogger(__name__)

#: Bytes of the longest message that is read here: an introduction.
_MAX_MESSAGE: Final = 1 << 20
_TICK_MS: Final = 200

#: Which model of this machine's stands for one of vLLM's. Raises WireError (``model``).
Choose = Callable[[str], str]


class Lobby:
    """A ROUTER and its thread, until a client has named a model that can be loaded."""

    def __init__(self, credentials: Credentials, choose: Choose) -> None:
        self._choose = choose
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket, self._guard = open_port(self._context, credentials, _MAX_MESSAGE)
        # No prompts are read here: any number does.
        self._decoder = client_decoder(1, 1)
        self._complaints = Seldom(logger)
        self._stopping = threading.Event()
        self._chosen = threading.Event()
        self._model = ""
        self._thread = threading.Thread(target=self._run, name="lobby", daemon=True)

    def bind(self, host: str, port: int) -> int:
        """See ``port.bind``; then clients are listened to."""
        port = bind(self._socket, host, port)
        self._thread.start()
        return port

    def wait(self, seconds: float) -> str | None:
        """The model that a client has asked for, None after that long without one."""
        return self._model if self._chosen.wait(seconds) else None

    def close(self) -> None:
        """Free the port."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(2.0)
        else:
            self._end()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._guard.events, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        while not self._stopping.is_set():
            poller.poll(_TICK_MS)
            try:
                self._guard.watch(lambda _descriptor: None)
                self._answer()
            except Exception:
                logger.exception("a control message could not be handled")
        self._end()

    def _end(self) -> None:
        self._guard.close()
        self._context.term()

    def _answer(self) -> None:
        try:
            identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        try:
            if len(frames) != 1:
                raise WireError(E_PROTOCOL, f"a control message of {len(frames)} frames, not 1")
            message = decode_client(frames[0], self._decoder)
            if not isinstance(message, Hello):
                raise WireError(E_PROTOCOL, "say Hello first")
            asked = introduction(message).model
            model = self._choose(asked)
            reason = f"this receiver loads {model} now, for which it has waited: try again soon"
            answer = Rejected(E_MODEL, clipped(reason))
            if not self._chosen.is_set():
                logger.info("vLLM serves %s: loading %s", printable(asked), model)
                self._model = model
                self._chosen.set()
        except WireError as error:
            self._complaints.warning("refused a control message: %s", error)
            answer = Rejected(error.code, clipped(error.reason))
        with contextlib.suppress(zmq.ZMQError):  # it has gone, or reads nothing
            self._socket.send_multipart([identity, encode(answer)], zmq.NOBLOCK)
