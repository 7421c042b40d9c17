"""What ties one request together: its client, its session in the store, its job in the engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Literal

from mlx_receiver.decode.engine import DecodeEngine
from mlx_receiver.decode.jobs import Job, Output, Proof, Verdict
from mlx_receiver.decode.model import ModelSource
from mlx_receiver.decode.sampling import check_bad_words
from mlx_receiver.metrics import Metrics
from mlx_receiver.sessions.proofs import Proofs
from mlx_receiver.sessions.session import Phase, Session
from mlx_receiver.sessions.store import SessionStore
from mlx_receiver.wire import trust
from mlx_receiver.wire.handshake import Introduction
from mlx_receiver.wire.layout import CacheLayout
from mlx_receiver.wire.messages import (
    E_CAPACITY,
    E_INTERNAL,
    E_SESSION,
    E_UNSUPPORTED,
    MAX_PROOF_TOKENS,
    Cancel,
    Code,
    Complete,
    DataPath,
    Decoded,
    Failed,
    Open,
    Opened,
    Progress,
    Proven,
    ReceiverMessage,
    Sampling,
    Start,
    Status,
    Step,
    WireError,
    clipped,
)
from mlx_receiver.wire.stopping import check_stop

logger = logging.getLogger(__name__)

Post = Callable[[ReceiverMessage], None]


class Client:
    """A welcomed vLLM, and the engine's sink for its jobs: one Step message a decode step."""

    def __init__(
        self,
        id: str,
        name: str,
        layout: CacheLayout,
        post: Post,
        sessions: SessionService,
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
        #: What its last Ping said of the way its blocks take.
        self.path: DataPath | None = None
        self.jobs: dict[Job, Session] = {}
        self._sessions = sessions

    def decoded(self, outputs: list[Output]) -> None:
        """See ``engine.Sink.decoded``."""
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
        """See ``engine.Sink.failed``."""
        session = self.jobs.pop(job, None)
        if session is not None:
            self._sessions.store.fail(session, code, reason)


class SessionService:
    """The receiver's answers to Open, Start and Cancel, and to what happens to a session."""

    store: SessionStore
    #: What comparing clients' caches gave; known once the model is loaded.
    proofs: Proofs

    def __init__(self, engine: DecodeEngine, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics

    @property
    def source(self) -> ModelSource:
        """The model that is served."""
        return self._engine.source

    # --- what a client asks; called on the control thread --------------------------------------

    def open(self, client: Client, message: Open) -> None:
        """Admit a session; ``Opened`` follows once its memory is there. Raises WireError."""
        source = self._engine.source
        try:
            tokens = len(message.prompt_token_ids)
            if message.codec != "raw":
                raise WireError(E_UNSUPPORTED, f"codec {message.codec!r} (known: raw)")
            if tokens >= client.context:
                raise WireError(
                    E_CAPACITY, f"a prompt of {tokens} tokens fills the model's {client.context}"
                )
            if message.unclaimed and client.context < source.max_tokens:
                # Whoever claims it would decode on, where the two engines' caches differ.
                raise WireError(
                    E_UNSUPPORTED,
                    f"the engines keep the same cache for {client.context} tokens only",
                )
            if self._engine.fault:
                raise WireError(E_INTERNAL, f"this receiver cannot decode: {self._engine.fault}")
            trust.check(message, source.signature.vocab_size, E_UNSUPPORTED)
            check_bad_words(message.sampling)
            if message.proof and (message.unclaimed or tokens > MAX_PROOF_TOKENS):
                raise WireError(
                    E_UNSUPPORTED, f"a proof is claimed, and of {MAX_PROOF_TOKENS} tokens at most"
                )
            if message.proof and any(s.proof for s in self.store.of_client(client)):
                raise WireError(E_CAPACITY, "a client has one proof at a time")
            self.store.open(message, client, client.layout)
        except WireError:
            self._metrics.sessions.labels("refused").inc()
            raise

    def start(self, client: Client, message: Start) -> None:
        """Note the first token and decode once the cache is complete. Raises WireError."""
        session = self._own(client, message.session)
        trust.check(message, self._engine.source.signature.vocab_size, E_UNSUPPORTED)
        if session.started(message.first_token):
            self._decode(session)

    def cancel(self, client: Client, message: Cancel) -> None:
        """Forget a session; one that is not the client's own is ignored."""
        session = self.store.get(message.session)
        if session is not None and session.client is client:
            self._drop(client, session, "cancelled")
        elif session is not None and session.opener is client:
            self._abandon(session)

    def claim(
        self, session_id: int, prompt_token_ids: list[int], sampling: Sampling, post: Post
    ) -> Client:
        """Take an unclaimed session over; its ``Step`` and ``Failed`` messages go to ``post``.

        Decoding begins with ``start``. Raises WireError (``session``) when there is no such
        session; its prompt must be known, so that nobody continues another's by accident.
        """
        session = self.store.get(session_id)
        if session is not None and session.prompt_token_ids == prompt_token_ids:
            context = self._engine.source.max_tokens
            client = Client("", "http", session.layout, post, self, context)
            if self.store.adopt(session, client, sampling):
                return client
        raise WireError(E_SESSION, "no such session waits here: it is unknown or has expired")

    def drop_client(self, client: Client, outcome: str) -> int:
        """Forget all sessions of a client; how many there were."""
        sessions = self.store.of_client(client)
        for session in sessions:
            self._drop(client, session, outcome)
        for session in self.store.sessions():
            if session.opener is client:
                self._abandon(session)
        self.store.dismiss(client.id)
        return len(sessions)

    def status(self, client: Client, ping_ns: int) -> Status:
        """Capacity and the client's sessions."""
        decoding = self._engine.decoding + self._engine.waiting
        coming = sum(s.phase is not Phase.DECODING for s in self.store.sessions())
        return Status(
            ping_ns=ping_ns,
            clock_ns=time.monotonic_ns(),
            accepting=self.store.accepting and not self._engine.fault,
            free_bytes=self.store.free_bytes,
            sessions=[
                Progress(s.id, _state(s), s.kv_bytes, s.decoded)
                for s in self.store.of_client(client)
            ],
            load=decoding + coming,
        )

    # --- what happens to a session (``store.SessionEvents``) -----------------------------------

    def opened(self, session: Session) -> None:
        """See ``SessionEvents.opened``."""
        _client(session).post(Opened(session.id))

    def complete(self, session: Session) -> None:
        """See ``SessionEvents.complete``."""
        for client in _clients(session):
            client.post(Complete(session.id, session.kv_bytes))
        if session.announced():
            self._decode(session)

    def failed(self, session: Session, code: Code, reason: str) -> None:
        """See ``SessionEvents.failed``."""
        self._cancel_job(_client(session), session)
        for client in _clients(session):
            client.post(Failed(session.id, code, clipped(reason)))

    def progressed(self, session: Session, output: Output) -> None:
        """Account for a decoded token; called on the decoding thread."""
        timeline = session.timeline
        if not timeline.first_decoded_ns:
            timeline.first_decoded_ns = time.monotonic_ns()
            began = max(timeline.complete_ns, timeline.started_ns)
            self._metrics.handoff_seconds.observe((timeline.first_decoded_ns - began) / 1e9)
        session.decoded = output.position
        if output.finish:
            _client(session).jobs.pop(output.job, None)
            self.store.end(session, "finished")

    def _decode(self, session: Session) -> None:
        client = _client(session)
        first = session.first_token
        assert first is not None
        if session.proof:
            self._prove(session, client, first)
            return
        finish = check_stop(session.sampling, first, 1, session.tokens + 1, client.context)
        if finish.reason:
            client.post(Step([Decoded(session.id, 1, [], finish.reason, finish.stop_reason)]))
            self.store.end(session, "finished")
            return
        job = Job(
            session.prompt_token_ids,
            session.sampling,
            client,
            first,
            lambda: session.take_memory().build(),
            session.reservation,
            client.context,
        )
        if not session.reservation.hold():
            return  # it was cancelled meanwhile
        client.jobs[job] = session
        session.job = job
        self._engine.submit(job)
        if session.phase is Phase.ENDED:
            # It was cancelled while the job was being made.
            self._cancel_job(client, session)

    def _prove(self, session: Session, client: Client, first: int) -> None:
        """Compare the session's cache with the model's own."""
        said = client.said
        assert said is not None  # only who introduced itself opens sessions
        try:
            own = self.store.budget.reserve(session.tokens, 1)
        except WireError as error:
            self.store.fail(session, error.code, error.reason)
            return
        if not session.reservation.hold():
            own.release()
            return  # it was cancelled meanwhile

        def done(verdict: Verdict | None) -> None:
            session.reservation.release()
            if verdict is None:
                self.store.fail(session, E_INTERNAL, "the caches could not be compared")
                return
            self.proofs.learn(said, client.key, verdict)
            level = logging.INFO if verdict.same else logging.WARNING
            logger.log(level, "client %s: %s", client.name, verdict.text)
            if self.store.end(session, "proven" if verdict.same else "disproved"):
                client.post(Proven(session.id, verdict.same, clipped(verdict.text)))

        self._engine.prove(
            Proof(
                session.prompt_token_ids,
                lambda: session.take_memory().build(),
                first,
                said.weights or said.layout.kv_dtype,
                said.layout.kv_dtype,
                own,
                lambda: session.phase is not Phase.ENDED,
                done,
            )
        )

    def _own(self, client: Client, session_id: int) -> Session:
        session = self.store.get(session_id)
        if session is None or session.client is not client:
            raise WireError(E_SESSION, f"session {session_id} is not open on this connection")
        return session

    def _drop(self, client: Client, session: Session, outcome: str) -> None:
        if self.store.end(session, outcome):
            self._cancel_job(client, session)
            if not session.complete and session.opener is not client:
                # It still sends blocks.
                _opener(session).post(Failed(session.id, E_SESSION, outcome))

    def _abandon(self, session: Session) -> None:
        """Who opened a session that another has claimed will send no more blocks for it."""
        if not session.complete:
            self.store.fail(session, E_SESSION, "the vLLM that prefills it gave it up")

    def _cancel_job(self, client: Client, session: Session) -> None:
        job = session.job
        if job is not None and client.jobs.pop(job, None) is not None:
            self._engine.cancel(job)


def _state(
    session: Session,
) -> Literal["receiving", "waiting", "queued", "decoding", "ended"]:
    """The session's ``Progress.state``: one whose job waits for room in the batch is queued."""
    match session.phase:
        case Phase.DECODING if session.job is None or not session.job.joined:
            return "queued"
        case Phase.RECEIVING | Phase.COMPLETE:
            return "receiving"
        case Phase.WAITING:
            return "waiting"
        case Phase.DECODING:
            return "decoding"
        case Phase.ENDED:
            return "ended"


def _client(session: Session) -> Client:
    assert isinstance(session.client, Client)
    return session.client


def _opener(session: Session) -> Client:
    assert isinstance(session.opener, Client)
    return session.opener


def _clients(session: Session) -> list[Client]:
    """Who hears of the session: who opened it and, where that is another, who claimed it."""
    opener, client = _opener(session), _client(session)
    return [opener] if opener is client else [opener, client]
