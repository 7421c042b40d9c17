"""What a receiver is told at its start."""

from __future__ import annotations

import ipaddress
from typing import Final

import msgspec

_UNITS: Final = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_MAX_PORT: Final = 65_535


class SettingsError(Exception):
    """A setting that cannot work; the text names the option."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Options of ``mlx-receiver start``; the command's help explains each.

    ``port`` and ``data_port`` may be 0 (any free port), ``http_port`` None (no HTTP).
    ``transport`` names one bulk transport or several, separated by commas; the first listens on
    ``data_port``, the others on the ports after it (any free ones when it is 0).
    ``prefill`` is the base URL of a vLLM that prefills for the HTTP API's clients; empty: none.
    ``allowed_hosts`` are further names of this machine for the HTTP API, separated by commas.
    An empty ``served_model_name`` means ``model``.
    ``kv_memory`` is in bytes, None for a share of what the machine has.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 7790
    data_port: int = 0
    http_port: int | None = 7791
    token: str = ""
    api_key: str = ""
    allowed_hosts: str = ""
    served_model_name: str = ""
    prefill: str = ""
    prefill_min_tokens: int = 512
    prefill_timeout: float = 60.0
    prefill_api_key: str = ""
    dtype: str = "auto"
    kv_memory: int | None = None
    max_sessions: int = 64
    max_batch: int = 32
    transport: str = "tcp"

    @property
    def transports(self) -> list[str]:
        """The names in ``transport``, each once, in order."""
        return list(dict.fromkeys(name.strip() for name in self.transport.split(",")))

    @property
    def hosts(self) -> list[str]:
        """The names in ``allowed_hosts``."""
        return [name.strip() for name in self.allowed_hosts.split(",") if name.strip()]

    def check(self) -> None:
        """Raise SettingsError for a combination that must not run."""
        check_ports(self.port, self.data_port, self.http_port, len(self.transports))
        if not self.token and not is_loopback(self.host):
            raise SettingsError(
                f"--host {self.host} is reachable from other machines, and without a token anyone "
                "there could use this receiver: set --token (or MAC_DECODE_TOKEN), and the same "
                'one on the vLLM side, e.g. --token "$(openssl rand -hex 16)"'
            )
        if self.http_port is not None and not self.api_key and not is_loopback(self.host):
            raise SettingsError(
                f"--host {self.host} makes the HTTP API reachable from other machines, and without "
                "a key anyone there could use the model: set --api-key (or MLX_RECEIVER_API_KEY), "
                "or --http-port -1 for no HTTP"
            )
        if self.prefill and not self.prefill.startswith(("http://", "https://")):
            raise SettingsError(f"--prefill {self.prefill} is not a URL, e.g. http://spark:8000")
        if self.prefill and self.http_port is None:
            raise SettingsError("--prefill is for clients of the HTTP API: it needs --http-port")
        if self.prefill_timeout <= 0:
            raise SettingsError("--prefill-timeout must be above 0 seconds")
        for name in ("max_sessions", "max_batch"):
            if getattr(self, name) < 1:
                raise SettingsError(f"--{name.replace('_', '-')} must be at least 1")
        if self.kv_memory is not None and self.kv_memory < 1:
            raise SettingsError("--kv-memory must be positive")


def check_ports(port: int, data_port: int, http_port: int | None, transports: int = 1) -> None:
    """Raise SettingsError for a number that is no port; each transport has one after the other."""
    last = data_port + transports - 1 if data_port else 0
    for option, number in (
        ("--port", port),
        ("--data-port", data_port),
        ("--data-port plus the number of transports", last),
        ("--http-port", http_port or 0),
    ):
        if not 0 <= number <= _MAX_PORT:
            raise SettingsError(f"{option} {number} is no port: 1 to {_MAX_PORT}, 0 for any")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def parse_bytes(text: str) -> int:
    """Bytes of "24GB", "512 MiB", "1.5g" or "1000000" (all units are powers of 1024).

    Raises SettingsError for anything else.
    """
    compact = text.strip().lower().replace(" ", "")
    number = compact.rstrip("bkmgti")
    unit = compact[len(number) :].replace("ib", "").replace("b", "")
    try:
        return int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise SettingsError(f"{text!r} is no amount of memory, e.g. 24GB or 512MB") from None
