"""Every setting of the Spark's side, in one typed place.

Sources, the first one wins: ``kv_connector_extra_config`` (which the ``--mac-decode-receiver``
flag also writes to), ``MAC_DECODE_<NAME>`` in the environment, the default.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec

ENV_PREFIX = "MAC_DECODE_"


class SettingsError(ValueError):
    """A setting is unknown or unusable; the text names it and says what to write instead."""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of the connector, by their names in ``kv_connector_extra_config``."""

    #: The receiver's control address, ``host:port``.
    receiver: str = "127.0.0.1:7790"
    #: The token that the receiver was started with, if any.
    token: str = ""
    #: Bulk transport; the receiver must offer it.
    transport: str = "tcp"
    #: Connections that a worker's blocks are spread over: more than one for a link that is faster
    #: than one connection (over 40 Gbit/s).
    streams: int = 1
    #: Off: everything decodes locally, as without the connector.
    enabled: bool = True
    #: Shorter prompts decode locally.
    min_prompt_tokens: int = 1
    #: Requests that may produce fewer tokens than this decode locally (at least 2: the first
    #: token is always vLLM's own).
    min_output_tokens: int = 2
    #: Seconds without any progress after which a response goes on locally.
    stall_timeout: float = 2.0
    #: Bounds the staging memory of each worker, in MiB.
    staging_mib: int = 128
    #: A checksum of every block: the receiver refuses damaged ones. Costs one pass over the bytes.
    checksum: bool = False

    def __post_init__(self) -> None:
        self.address()  # raises
        if self.stall_timeout <= 0:
            raise ValueError("stall_timeout must be above 0 seconds")
        if not 0 < self.streams <= 16:
            raise ValueError("streams must be 1 to 16")
        if self.staging_mib < 16:
            raise ValueError("staging_mib must be at least 16")
        if self.min_output_tokens < 2:
            raise ValueError("min_output_tokens must be at least 2")

    def address(self) -> tuple[str, int]:
        """The receiver's host and port. Raises ValueError unless it is ``host:port``."""
        host, _, port = self.receiver.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"receiver must be host:port, not {self.receiver!r}")
        return host.strip("[]"), int(port)


def load(
    extra_config: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Settings from vLLM's extra config and the environment.

    Raises SettingsError naming the key, its source, and the known names.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for name in Settings.__struct_fields__:
        variable = ENV_PREFIX + name.upper()
        if environ.get(variable):
            values[name] = environ[variable]
    extra = dict(extra_config or {})
    unknown = sorted(set(extra) - set(Settings.__struct_fields__))
    if unknown:
        raise SettingsError(
            f"unknown key{'s' if len(unknown) > 1 else ''} in kv_connector_extra_config: "
            f"{', '.join(unknown)} (known: {', '.join(Settings.__struct_fields__)})"
        )
    values |= extra
    try:
        return msgspec.convert(values, Settings, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        raise SettingsError(f"mac_decode settings: {error}") from None
