"""A whole receiver: model, decode engine, sessions, control channel, data channel, HTTP."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from mlx_receiver import plugins
from mlx_receiver.control.desk import Desk, Presence
from mlx_receiver.control.lobby import Choose
from mlx_receiver.control.server import ControlServer
from mlx_receiver.decode import weights
from mlx_receiver.decode.device import engine_name
from mlx_receiver.decode.engine import DecodeEngine
from mlx_receiver.decode.lengths import computed_alike
from mlx_receiver.decode.model import LoadedModel, ModelSource, Progress, find_model
from mlx_receiver.decode.speed import Speed
from mlx_receiver.metrics import Metrics
from mlx_receiver.sessions import disk
from mlx_receiver.sessions.disk import DiskTier, depends_on
from mlx_receiver.sessions.proofs import Proofs
from mlx_receiver.sessions.service import SessionService
from mlx_receiver.sessions.store import SessionStore
from mlx_receiver.settings import Settings, SettingsError
from mlx_receiver.transports.tcp import TcpTransport
from mlx_receiver.transports.transport import Listener, Transport
from mlx_receiver.wire import fingerprint
from mlx_receiver.wire.addresses import EVERYWHERE, bare, spelled
from mlx_receiver.wire.messages import Endpoint

if TYPE_CHECKING:
    from mlx_receiver.http.server import HttpServer

logger = logging.getLogger(__name__)

#: Files and connections that may be open: a Mac's OPEN_MAX.
_FILES: Final = 10_240


class Receiver:
    """Starts and stops everything. A context manager: ``with Receiver(settings) as receiver``.

    After ``start`` the ports are bound and the model loads; after ``wait_ready`` it serves.
    """

    def __init__(
        self,
        settings: Settings,
        progress: Progress | None = None,
        choose: Choose | None = None,
    ) -> None:
        """Raises SettingsError or ModelError; binds and loads nothing yet.

        ``choose``: see ``ControlServer``.
        """
        settings.check()
        self.settings = settings
        self.metrics = Metrics()
        self.source: ModelSource = find_model(settings.model)
        self.engine = DecodeEngine(
            self.source,
            dtype=settings.dtype,
            max_batch=settings.max_batch,
            metrics=self.metrics,
            progress=progress,
            warm_up=True,
        )
        self.sessions = SessionService(self.engine, self.metrics)
        self.store = SessionStore(
            max_sessions=settings.max_sessions,
            events=self.sessions,
            metrics=self.metrics,
            keeps=settings.prompt_cache,
        )
        self.sessions.store = self.store
        self.engine.use(self.store.earlier)
        self.metrics.sessions_active.set_function(lambda: len(self.store.sessions()))
        self.metrics.kv_reserved_bytes.set_function(lambda: self.store.reserved_bytes)
        self.metrics.resident_bytes.set_function(lambda: self.store.residents.nbytes)
        self.metrics.queued_bytes.set_function(lambda: self.store.budget.queued)
        self.desk = Desk.of(settings)
        self.control = ControlServer(
            self.sessions, self.source.signature, self.desk.credentials, choose
        )
        self.port = 0
        self.http: HttpServer | None = None
        self.started = time.monotonic()
        self._listeners: list[Listener] = []
        self.presence: Presence | None = None
        #: How fast the model is here; None until it is loaded.
        self.speed: Speed | None = None

    @property
    def address(self) -> str:
        """``host:port`` of the control channel, as programs on this machine reach it."""
        host = self.settings.host
        return spelled("127.0.0.1" if bare(host) in (*EVERYWHERE, "0.0.0.0") else host, self.port)

    @property
    def http_port(self) -> int:
        """Where HTTP is served, 0 where it is not."""
        return self.http.port if self.http is not None else 0

    @property
    def status(self) -> Literal["ok", "loading", "failing"]:
        """What ``GET /health`` says: "failing" while nothing can be decoded."""
        if self.engine.loaded is None:
            return "loading"
        return "failing" if self.engine.fault else "ok"

    @property
    def data_endpoints(self) -> list[Endpoint]:
        """Where each data transport listens."""
        return [listener.endpoint for listener in self._listeners]

    def start(self) -> None:
        """Bind every port, then start to load. Raises SettingsError naming a port in use."""
        settings = self.settings
        _allow_files()
        if settings.kv_disk:
            with _usable(settings.kv_disk) as folder:
                disk.prepare(folder)
        self.port = self.control.bind(settings.host, settings.port)
        for index, transport in enumerate([_transport(name) for name in settings.transports]):
            port = settings.data_port and settings.data_port + index
            try:
                listener = transport.listen(
                    settings.host, port, self.store, plain=settings.plain_data
                )
            except OSError as error:
                raise SettingsError(
                    f"the data port {settings.host}:{port} cannot be used "
                    f"({os.strerror(error.errno or 0)}): choose another with --data-port"
                ) from None
            self._listeners.append(listener)
        if settings.http_port is not None:
            from mlx_receiver.http.server import HttpServer, application

            self.http = HttpServer(settings, application(self))
            self.http.start()
        self.presence = Presence(
            self.desk,
            settings,
            self.port,
            self.http_port,
            self.source.vllm_name or self.source.name,
        )
        self.engine.start()

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Serve clients as soon as the model is loaded; False after ``timeout`` seconds.

        Raises ModelError when it cannot be loaded.
        """
        loaded = self.engine.wait_loaded(timeout)
        if loaded is None:
            return False
        budget = self.settings.kv_memory or default_kv_memory(loaded)
        self.store.configure(loaded.cache, budget, self._disk(loaded))
        self.engine.limit_batch(budget)
        _limit_mlx_cache(budget // 8)
        self.sessions.proofs = Proofs(
            self.source.path, loaded.dtype, self.desk.keystore.folder / "proofs.json"
        )
        self.sessions.speed = self.speed = Speed(
            self.source,
            loaded,
            self.store.budget,
            self.settings.max_batch,
            measures=self.settings.profile,
        )
        self.metrics.show_errors(self.speed.error)
        self.engine.observe(self.speed)
        self.control.start(
            self.source.name,
            engine_name(),
            self.data_endpoints,
            computed_alike(self.source.config, self.source.max_tokens),
            loaded.cache.layout,
            loaded.local,
        )
        return True

    def _disk(self, loaded: LoadedModel) -> DiskTier | None:
        """The second tier of what texts leave, where one is wanted. Raises SettingsError."""
        settings = self.settings
        if not settings.kv_disk:
            return None
        if not loaded.cache.resumes(loaded.cache.layout) or not loaded.cache.lasting_places:
            logger.warning(
                "--kv-disk: nothing of %s is kept, since no layer of it keeps every token",
                self.source.name,
            )
            return None
        model = depends_on(
            loaded.cache.layout,
            fingerprint.of_folder(self.source.path),
            str(loaded.dtype),
            engine_name(),
            metadata.version("mlx-lm"),
        )
        with _usable(settings.kv_disk) as folder:
            try:
                return DiskTier(folder, settings.kv_disk_size, model, self.metrics)
            except BlockingIOError:
                logger.warning("--kv-disk: another receiver uses %s; this one does not", folder)
                return None

    def stop(self) -> None:
        """Tell the clients, end every session, free the ports. Takes at most about 2 s."""
        if self.presence is not None:
            self.presence.close()
        self.control.stop()
        self.store.close()
        for listener in self._listeners:
            listener.close()
        if self.http is not None:
            self.http.stop()
        self.engine.stop(timeout=1.0)

    def __enter__(self) -> Receiver:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextlib.contextmanager
def _usable(kv_disk: str) -> Iterator[Path]:
    """The folder. Raises SettingsError for one that cannot be used."""
    folder = Path(kv_disk).expanduser()
    try:
        yield folder
    except OSError as error:
        raise SettingsError(
            f"--kv-disk {folder} cannot be used ({error.strerror}): name a folder that this user "
            "can write to"
        ) from None


def default_kv_memory(loaded: LoadedModel) -> int:
    """Bytes that sessions may reserve on this machine when nobody said otherwise."""
    memory = weights.memory()
    if memory is not None and memory.metal:
        return max(1, int((memory.limit - loaded.nbytes) * weights.KV_SHARE))
    # The weights are in memory already, so what is available does not contain them.
    return int(weights.available_memory() * weights.KV_SHARE)


def _allow_files() -> None:
    """Open as many files as the system lets us without being asked: on a Mac it starts with 256,
    and every connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _limit_mlx_cache(nbytes: int) -> None:
    """Let MLX keep at most ``nbytes`` of freed buffers for reuse; by default it keeps nearly all.

    Sessions of similar length reuse one another's buffers, which is worth a little memory.
    """
    import mlx.core as mx

    mx.set_cache_limit(nbytes)


def _transport(name: str) -> Transport:
    if name == "tcp" and name not in plugins.transports():
        return TcpTransport()
    try:
        return plugins.transport(name)
    except ValueError as error:
        raise SettingsError(str(error)) from None
