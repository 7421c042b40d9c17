"""A vLLM that was welcomed, or somebody who claims a session over HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from mlx_receiver.decode.jobs import Job, Output
from mlx_receiver.sessions.session import Session
from mlx_receiver.wire.handshake import Introduction
from mlx_receiver.wire.layout import CacheLayout
from mlx_receiver.wire.messages import Code, DataPath, Decoded, ReceiverMessage, Step
from mlx_receiver.wire.profile import Profile
from mlx_receiver.wire.quantised import RAW

Post = Callable[[ReceiverMessage], None]


class Sessions(Protocol):
    """Who accounts for what clients' jobs come to."""

    def progressed(self, session: Session, output: Output) -> None:
        """Tokens of the session were decoded."""

    def fail(self, session: Session, code: Code, reason: str) -> None:
        """The session cannot go on."""


class Client:
    """A welcomed vLLM, and the ``jobs.Sink`` of its jobs: one Step message a decode step."""

    def __init__(
        self,
        id: str,
        name: str,
        layout: CacheLayout,
        post: Post,
        sessions: Sessions,
        context: int,
        said: Introduction | None = None,
        key: str = "",
    ) -> None:
        """``context``: tokens that a text of its may have; ``said``: how it introduced itself, and
        ``key``: whose connection it is."""
        #: Its ticket's; "" for one that has no data channel.
        self.id = id
        self.name = name
        #: Of the caches that it sends.
        self.layout = layout
        self.context = context
        self.said = said
        self.key = key
        self.post = post
        self.last_heard = time.monotonic()
        #: How fast it was told that this receiver is.
        self.told: Profile | None = None
        #: What its last Ping said of the way its blocks take.
        self.path: DataPath | None = None
        self.jobs: dict[Job, Session] = {}
        self._sessions = sessions

    def partition(self, salt: str, codec: str = RAW) -> str:
        """Whose texts this client's prompts may share KV with: those of the same machine and the
        same weights, also from before it restarted. What came in a ``codec`` that loses something
        is no beginning for what comes as it is."""
        weights = self.said.fingerprint if self.said else ""
        # Where it is not known which weights it has, nobody's texts are like its own.
        texts = "\n".join([self.key, weights or self.id, salt])
        return texts if codec == RAW else f"{codec} {texts}"

    def decoded(self, outputs: list[Output]) -> None:
        decoded = []
        for output in outputs:
            session = self.jobs.get(output.job)
            if session is None:
                continue
            decoded.append(
                Decoded(
                    session.id,
                    output.position,
                    output.token_ids,
                    output.finish,
                    output.stop_reason,
                    output.logprobs,
                )
            )
            self._sessions.progressed(session, output)
        if decoded:
            self.post(Step(decoded))

    def failed(self, job: Job, code: Code, reason: str) -> None:
        session = self.jobs.pop(job, None)
        if session is not None:
            self._sessions.fail(session, code, reason)
