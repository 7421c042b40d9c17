"""What ties one request together: its client, its session in the store, its job in the engine."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from typing import Any, Literal

from mlx_receiver.decode.engine import DecodeEngine
from mlx_receiver.decode.grammar.compiling import Compiled
from mlx_receiver.decode.jobs import Job, Output, Proof, Verdict
from mlx_receiver.decode.model import ModelSource
from mlx_receiver.decode.speed import Speed
from mlx_receiver.metrics import Metrics
from mlx_receiver.planning.cost import Strategy
from mlx_receiver.planning.live import alike
from mlx_receiver.sessions.admission import check_open
from mlx_receiver.sessions.client import Client, Post
from mlx_receiver.sessions.front import Front, computable
from mlx_receiver.sessions.proofs import Proofs
from mlx_receiver.sessions.session import Phase, Session
from mlx_receiver.sessions.store import SessionStore
from mlx_receiver.wire import trust
from mlx_receiver.wire.layout import Held
from mlx_receiver.wire.messages import (
    E_CAPACITY,
    E_INTERNAL,
    E_SESSION,
    E_UNSUPPORTED,
    Cancel,
    Code,
    Complete,
    Decoded,
    Failed,
    Open,
    Opened,
    Progress,
    Proven,
    Start,
    Status,
    Step,
    WireError,
    clipped,
)
from mlx_receiver.wire.profile import Profile
from mlx_receiver.wire.sampling import Sampling
from mlx_receiver.wire.stopping import check_stop

logger = logging.getLogger(__name__)


class SessionService:
    """The receiver's answers to Open, Start and Cancel, and to what happens to a session."""

    store: SessionStore
    #: What comparing clients' caches gave; known once the model is loaded.
    proofs: Proofs
    #: How fast the model is here; None until it is loaded.
    speed: Speed | None = None

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
        try:
            if self._engine.fault:
                raise WireError(E_INTERNAL, f"this receiver cannot decode: {self._engine.fault}")
            check_open(message, client, self._engine.source)
            if message.proof and any(s.proof for s in self.store.of_client(client)):
                raise WireError(E_CAPACITY, "a client has one proof at a time")
            self._open(client, message)
        except WireError:
            self._metrics.sessions.labels("refused").inc()
            raise

    def _open(self, client: Client, message: Open) -> None:
        """Open the session while its grammar, if it has one, is compiled. Raises WireError."""
        # Whoever claims a session tells its grammar, like all of its sampling.
        grammar = None if message.unclaimed else message.sampling.grammar
        partition = client.partition(message.salt, message.codec)
        compiled = self._engine.grammars.compile(grammar) if grammar is not None else None
        done = compiled is not None and compiled.done() and not compiled.cancelled()
        if done and compiled and isinstance(error := compiled.exception(), WireError):
            # Another one: an exception keeps alive what raised it.
            raise WireError(error.code, error.reason)
        if message.compute == "all":
            self._compute(client, message, partition, compiled)
            return
        session = self.store.open(message, client, client.layout, partition)
        if compiled is None:
            return
        session.compiling = compiled  # it may be forgotten until the text begins

        def refuse(future: Future[Compiled]) -> None:
            if not future.cancelled() and isinstance(error := future.exception(), WireError):
                self.store.fail(session, error.code, error.reason)

        compiled.add_done_callback(refuse)

    def _compute(
        self, client: Client, message: Open, partition: str, compiled: Future[Compiled] | None
    ) -> None:
        """Prefill the prompt here, but for what earlier texts left of it. Raises WireError."""
        job = Job(message.prompt_token_ids, message.sampling, client, context=client.context)
        job.partition, job.compiling = partition, compiled
        session = self.store.compute(message, client, job)
        client.jobs[job] = session
        client.post(Opened(session.id))
        self._engine.submit(job)
        if session.phase is Phase.ENDED:
            self._cancel_job(client, session)  # the receiver is stopping

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
                Progress(s.id, _state(s), s.kv_bytes + s.computed_bytes, s.decoded, s.computed)
                for s in self.store.of_client(client)
            ],
            load=decoding + coming,
            profile=self.news(client),
        )

    def news(self, client: Client) -> Profile | None:
        """How fast this receiver is, if the client was told otherwise, or nothing yet."""
        profile = self.speed.profile if self.speed is not None else None
        if profile is None or alike(profile, client.told):
            return None
        client.told = profile
        return profile

    # --- what happens to a session (``store.SessionEvents``, ``client.Sessions``) --------------

    def opened(self, session: Session) -> None:
        # Of a prompt that is held nothing has to come: it may have been claimed before this.
        _opener(session).post(Opened(session.id, session.held))
        loaded = self._engine.loaded
        if loaded is not None and computable(session, loaded.cache):
            self._engine.compute(
                Front(session, loaded.cache, self.store.budget, self._metrics, self.complete)
            )

    def complete(self, session: Session) -> None:
        for client in _clients(session):
            client.post(Complete(session.id, session.kv_bytes, session.computed_bytes))
        if session.announced():
            self._decode(session)

    def fail(self, session: Session, code: Code, reason: str) -> None:
        self.store.fail(session, code, reason)

    def failed(self, session: Session, code: Code, reason: str) -> None:
        self._cancel_job(_client(session), session)
        for client in _clients(session):
            client.post(Failed(session.id, code, clipped(reason)))

    def progressed(self, session: Session, output: Output) -> None:
        """Account for a decoded token; called on the decoding thread."""
        timeline = session.timeline
        here = session.strategy is Strategy.MAC
        if not timeline.first_decoded_ns:
            timeline.first_decoded_ns = time.monotonic_ns()
            if here:
                self._computed(session, output.job)
            else:
                began = max(timeline.complete_ns, timeline.started_ns)
                self._metrics.handoff_seconds.observe((timeline.first_decoded_ns - began) / 1e9)
        session.decoded = output.position + here
        if output.finish:
            _client(session).jobs.pop(output.job, None)
            self.store.end(session, "finished")

    def _computed(self, session: Session, job: Job) -> None:
        """The job has its prompt's cache: tell how much of it an earlier text had left."""
        session.timeline.complete_ns = session.timeline.first_decoded_ns
        session.held = Held(job.held)
        computed = session.tokens - job.held
        self._metrics.computed_tokens.inc(computed)
        _client(session).post(Complete(session.id, 0, computed=computed))

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
            lambda: self._build(session),
            session.reservation,
            client.context,
            self.store.earlier.keeper(
                session.partition,
                session.layout,
                session.reservation,
                session.tokens,
                session.beginning,
            ),
        )
        job.compiling, session.compiling = session.compiling, None
        if not session.reservation.hold():
            return  # it was cancelled meanwhile
        client.jobs[job] = session
        session.job = job
        self._engine.submit(job)
        if session.phase is Phase.ENDED:
            # It was cancelled while the job was being made.
            self._cancel_job(client, session)

    def _build(self, session: Session) -> list[Any]:
        """The session's caches, on the decoding thread."""
        buffers = session.take_memory()
        self.store.built(session)
        return buffers.build()

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
    """The session's ``Progress.state``: one whose job waits for its turn is queued."""
    match session.phase:
        case Phase.DECODING if session.job is None or not session.job.joined:
            return "queued"
        case Phase.DECODING if session.strategy is Strategy.MAC and not session.begun:
            return "queued"  # others' prompts may come before it
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
