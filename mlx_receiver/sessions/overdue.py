"""Which sessions have come to nothing, and are given up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from mlx_receiver.planning.cost import Strategy
from mlx_receiver.sessions.session import Session
from mlx_receiver.wire.messages import E_BLOCK, E_SESSION, Code

#: Seconds without a block after which a started session with a hole is given up.
STALL_SECONDS: Final = 15.0

#: The same for a session that nothing has started yet: vLLM may be computing a long step.
IDLE_SECONDS: Final = 30.0

#: Seconds after its last block in which an unclaimed session must be claimed.
LEASE_SECONDS: Final = 30.0


def overdue(sessions: Iterable[Session], now: float) -> Iterator[tuple[Session, Code, str]]:
    """Those whose last blocks never came, for which nothing comes, and unclaimed ones that nobody
    wants; and why."""
    for session in sessions:
        seconds = now - session.last_progress
        if session.first_token is not None:
            if not session.complete and seconds > STALL_SECONDS:
                why = (
                    f"no block came for {STALL_SECONDS:.0f} s, but the cache is incomplete: "
                    f"{session.missing()}"
                )
                yield session, E_BLOCK, why
        elif session.unclaimed:
            if seconds > LEASE_SECONDS:
                yield session, E_SESSION, f"nobody claimed it within {LEASE_SECONDS:.0f} s"
        elif session.strategy is not Strategy.MAC and seconds > IDLE_SECONDS:
            yield session, E_SESSION, f"no block and no Start came for {IDLE_SECONDS:.0f} s"
