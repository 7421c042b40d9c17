"""HTTP connections: how many there are, how long one may do nothing, and who gives way."""

from __future__ import annotations

import asyncio
import resource
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

#: Connections at once; fewer where the system allows the process few files.
_MOST: Final = 512
#: Seconds in which a request's head must have come, counted from the connection's beginning or the
#: answer before it.
_HEAD_SECONDS: Final = 10.0
#: Seconds in which a client must read something of an answer that waits for it.
_STALL_SECONDS: Final = 30.0


def max_connections() -> int:
    """Connections that may be open: half of the files that the process may have, at most."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if files == resource.RLIM_INFINITY else max(16, min(_MOST, files // 2))


class Connection(H11Protocol):
    """uvicorn's connection with limits. ``proved``: its last request showed the API key."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.app_state = {**self.app_state, "connection": self}
        self.proved = False
        self._limit = max_connections()
        #: Runs while no request is under way.
        self._idle: asyncio.TimerHandle | None = None
        #: The server's connections without a request, the one that has waited longest first.
        self._waiting: dict[Connection, None] = vars(self.server_state).setdefault("waiting", {})
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """One more. Beyond the limit that one gives way which has been idle longest."""
        super().connection_made(transport)
        self._wait_for_head()
        if len(self.connections) > self._limit:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        super().connection_lost(exc)
        self._waiting.pop(self, None)
        for timer in (self._idle, self._stalled):
            if timer is not None:
                timer.cancel()

    def handle_events(self) -> None:
        """Bytes have come: a head that is complete ends the wait for it."""
        super().handle_events()
        if self._idle is not None and self.cycle is not None and not self.cycle.response_complete:
            self._idle.cancel()
            self._idle = None
            self._waiting.pop(self, None)

    def on_response_complete(self) -> None:
        """The answer is written; the next request may come."""
        self._wait_for_head()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(_STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _wait_for_head(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = self.loop.call_later(_HEAD_SECONDS, self._too_slow)
        self._waiting.pop(self, None)
        self._waiting[self] = None

    def _too_slow(self) -> None:
        if self._stalled is not None:
            # A long answer is still being read.
            self._wait_for_head()
        else:
            self.transport.abort()
