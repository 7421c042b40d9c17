"""A socket of the control channel, and why a receiver does not answer on it."""

from __future__ import annotations

import socket
import time
from typing import Final, Literal

import zmq
from zmq.utils.monitor import recv_monitor_message

from mlx_receiver.wire import addresses, codec, keys, trust
from mlx_receiver.wire import messages as m
from vllm_mac_decode.scheduler.candidates import Candidate

#: Messages that ZeroMQ may hold for us: what a receiver may make this process keep.
_UNREAD: Final = 256
_HANDSHAKE_FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_EVENTS: Final = zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | _HANDSHAKE_FAILED


class NoAnswer(Exception):
    """Nobody has answered yet, or nobody will.

    ``kind``: ``address`` (it cannot be used), ``nobody`` (no connection so far), ``silent`` (a
    connection, but no word so far), ``keys`` (another token, or another version), ``hung_up`` (no
    receiver's control port).
    """

    def __init__(
        self, kind: Literal["address", "nobody", "silent", "keys", "hung_up"], text: str
    ) -> None:
        super().__init__(text)
        self.kind = kind


class ControlSocket:
    """A DEALER for one conversation. For one thread; ``close`` it."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], candidate: Candidate, timeout: float
    ) -> None:
        """Begins to connect. Raises NoAnswer (``address``, ``nobody``)."""
        self._receiver = candidate.name
        self._reached = False
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 1000)
        self._socket.setsockopt(zmq.RCVHWM, _UNREAD)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, m.MAX_MESSAGE_BYTES)
        keys.guard_client(self._socket, candidate.keys)
        # ZeroMQ would reconnect silently, to a receiver that knows nothing of us.
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        try:
            #: The receiver's address that answers, of those that its name has.
            self.address = _answering(candidate, timeout)
            self._socket.connect(f"tcp://{self.address.text}")
        except NoAnswer:
            self.close()
            raise
        except zmq.ZMQError as error:
            self.close()
            raise NoAnswer("address", f"cannot use {candidate.name}: {error}") from None

    def close(self) -> None:
        """Drop what has not been sent."""
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()

    def wait(self, seconds: float, *others: socket.socket) -> None:
        """Until something is to be read here, or from the others, or that time is over."""
        poller = zmq.Poller()
        for readable in (self._socket, self._monitor, *others):
            poller.register(readable, zmq.POLLIN)
        poller.poll(int(seconds * 1000))

    def send(self, message: m.ClientMessage) -> None:
        """Raises zmq.Again when the receiver takes nothing any more."""
        self._socket.send(codec.encode(message), zmq.NOBLOCK)

    def read(self, vocab_size: int) -> m.ReceiverMessage | None:
        """The next message, checked; None while there is none. Raises WireError."""
        if not self._socket.poll(0):
            return None
        packed = self._socket.recv(zmq.NOBLOCK)
        if self._socket.getsockopt(zmq.RCVMORE):
            raise m.WireError(m.E_PROTOCOL, "a message of several parts")
        message = codec.decode_receiver(packed)
        trust.check(message, vocab_size)
        return message

    def lost(self) -> bool:
        """Whether the connection has ended."""
        return self._event() == zmq.EVENT_DISCONNECTED

    def check_answering(self) -> NoAnswer:
        """While there is no first answer: why not yet. Raises NoAnswer if there will be none."""
        event = self._event()
        if event & _HANDSHAKE_FAILED:
            raise NoAnswer(
                "keys",
                f"the receiver at {self._receiver} does not know this machine: pair the two (run "
                "`mlx-receiver pair` there), or compare MAC_DECODE_TOKEN with its --token, and the "
                "versions of vllm-mac-decode",
            )
        if event == zmq.EVENT_DISCONNECTED and not self._socket.poll(0):
            raise NoAnswer(
                "hung_up",
                f"what listens at {self._receiver} hangs up: is it a receiver's control port?",
            )
        self._reached = self._reached or event == zmq.EVENT_CONNECTED
        if self._reached:
            return NoAnswer(
                "silent",
                f"{self._receiver} takes the connection, but does not answer: is it a receiver's "
                "control port, and has the receiver loaded its model?",
            )
        return NoAnswer("nobody", f"no receiver answers at {self._receiver}")

    def _event(self) -> int:
        """The oldest event that was not seen yet, or 0."""
        if not self._monitor.poll(0):
            return 0
        return int(recv_monitor_message(self._monitor)["event"])


def _answering(candidate: Candidate, timeout: float) -> addresses.Address:
    """The first address of the receiver's name that takes a connection: ZeroMQ would try one only,
    and of a name with both IP versions that of version 6. Raises NoAnswer."""

    def attempt(address: addresses.Address, until: float) -> addresses.Address:
        with socket.socket(address.family, socket.SOCK_STREAM) as probe:
            probe.settimeout(max(until - time.monotonic(), 0.01))
            probe.connect(address.sockaddr)
        return address

    try:
        return addresses.try_each(candidate.host, candidate.port, timeout, attempt)
    except socket.gaierror as error:
        raise NoAnswer("address", f"cannot use {candidate.name}: {error.strerror}") from None
    except (OSError, UnicodeError):
        raise NoAnswer("nobody", f"no receiver answers at {candidate.name}") from None
