"""A receiver before it knows which model to serve: it can be found, paired with, and asked."""

from __future__ import annotations

from mlx_receiver.control.desk import Desk, Presence
from mlx_receiver.control.lobby import Choose, Lobby
from mlx_receiver.http.server import HttpServer, waiting_application
from mlx_receiver.settings import Settings


class WaitingReceiver:
    """A context manager. Its ports are free again afterwards, for the ``Receiver`` that follows."""

    def __init__(self, settings: Settings, choose: Choose) -> None:
        """Raises SettingsError."""
        self.settings = settings
        self.desk = Desk.of(settings)
        self._lobby = Lobby(self.desk.credentials, choose)
        self.presence: Presence | None = None
        self._http: HttpServer | None = None
        self.port = 0

    @property
    def http_port(self) -> int:
        """Where HTTP is served, 0 where it is not."""
        return self._http.port if self._http is not None else 0

    def wait(self, seconds: float) -> str | None:
        """The model to load, None after that long."""
        return self._lobby.wait(seconds)

    def __enter__(self) -> WaitingReceiver:
        """Bind the ports. Raises SettingsError naming one in use."""
        settings = self.settings
        try:
            self.port = self._lobby.bind(settings.host, settings.port)
            if settings.http_port is not None:
                self._http = HttpServer(settings, waiting_application(settings, self.desk))
                self._http.start()
            self.presence = Presence(self.desk, settings, self.port, self.http_port)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self.presence is not None:
            self.presence.close()
        self._lobby.close()
        if self._http is not None:
            self._http.stop()
