"""Every setting of the Spark's side, in one typed place.

Sources, the first one wins: ``kv_connector_extra_config`` (which the ``--mac-decode-receiver``
flag also writes to), ``MAC_DECODE_<NAME>`` in the environment, the default.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mlx_receiver.options import token_in

ENV_PREFIX = "MAC_DECODE_"

#: Where ``mlx-receiver start`` listens unless it is told otherwise.
DEFAULT_PORT = 7790

#: Receivers that one vLLM uses at once.
MOST_RECEIVERS = 8


class SettingsError(ValueError):
    """A setting is unknown or unusable; the text names it and says what to write instead."""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of the connector, by their names in ``kv_connector_extra_config``."""

    receiver: Annotated[
        str,
        Meta(
            description="The receiver's control address, host or host:port; the name is resolved "
            "at every connection. Several are separated by commas, and each request goes to the "
            "one with the least to do. Empty: all that announce themselves on the network and are "
            "paired."
        ),
    ] = ""
    token: Annotated[str, Meta(description="The token the receiver was started with.")] = ""
    token_file: Annotated[
        str, Meta(description="A file that holds the token: vLLM logs its command line.")
    ] = ""
    discovery: Annotated[
        bool, Meta(description="false: no receiver is looked for on the network (multicast DNS).")
    ] = True
    transport: Annotated[str, Meta(description="Data transport; the receiver must offer it.")] = (
        "tcp"
    )
    streams: Annotated[
        int | Literal["auto"],
        Meta(
            description="Connections that a worker's blocks are spread over; auto: one, and a "
            "second when the first holds the export up, on links beyond 25 Gbit/s."
        ),
    ] = "auto"
    codec: Annotated[
        Literal["raw", "q8", "q4", "auto"],
        Meta(
            description="How K and V travel: raw, as they are; q8 or q4, quantised to 8 or 4 bits "
            "(MLX's affine quantisation, groups of 64), in about a half or a quarter of the bytes "
            "of 16-bit numbers, for slow links; responses differ, with q8 hardly; auto: q8 for "
            "requests that are predicted to end clearly sooner with it, raw for the others."
        ),
    ] = "raw"
    enabled: Annotated[
        bool, Meta(description="false: everything decodes locally, as without the connector.")
    ] = True
    offload: Annotated[
        Literal["auto", "always", "never", "mac", "meet"],
        Meta(
            description="Who does what: auto: whichever is predicted to be the fastest for a "
            "request, until both sides know how fast they are as always; always: vLLM prefills, "
            "the receiver decodes; never: vLLM does both; mac: the receiver does both; meet: it "
            "computes a prompt's beginning while vLLM sends the rest."
        ),
    ] = "auto"
    offload_threshold: Annotated[
        int,
        Meta(
            description="Prompts of which vLLM would have to compute fewer tokens than this, as "
            "it has cached the others, decode locally."
        ),
    ] = 0
    proof: Annotated[
        bool,
        Meta(
            description="false: hand off without having compared the two engines' caches of some "
            "tokens first."
        ),
    ] = True
    shadow_prefill: Annotated[
        bool,
        Meta(
            description="false: vLLM does not prefill, while it is idle, what a receiver has "
            "decoded: a conversation's next turn has the last answer prefilled again."
        ),
    ] = True
    shadow_chunk: Annotated[
        int,
        Meta(
            description="Tokens that vLLM prefills of that in one step, rounded to blocks: a "
            "request that arrives during such a step waits for its end."
        ),
    ] = 256
    profile: Annotated[
        bool,
        Meta(
            description="false: vLLM does not measure once, while it is idle, how fast it is; what "
            "was measured before is used in any case."
        ),
    ] = True
    min_prompt_tokens: Annotated[int, Meta(description="Shorter prompts decode locally.")] = 1
    #: At least 2: the first token is always vLLM's own.
    min_output_tokens: Annotated[
        int, Meta(description="Requests that may produce fewer tokens decode locally.")
    ] = 2
    stall_timeout: Annotated[
        float,
        Meta(description="Seconds without any progress after which a response goes on locally."),
    ] = 2.0
    queue_timeout: Annotated[
        float,
        Meta(
            description="Seconds that a response may wait for room in the receiver's batch before "
            "it goes on locally."
        ),
    ] = 30.0
    staging_mib: Annotated[
        int,
        Meta(
            description="Staging memory of each vLLM worker for each receiver, in MiB; the "
            "first one's is taken when vLLM starts, others' when they are used. Beside a discrete "
            "GPU as much again on the GPU."
        ),
    ] = 128
    checksum: Annotated[
        bool,
        Meta(
            description="A checksum (XXH3) of every block: the receiver refuses damaged ones. Each "
            "side reads the bytes once more, 0.1 CPU-seconds a GB: nothing at 10 Gbit/s, a third "
            "of the speed over loopback."
        ),
    ] = False
    plain_data: Annotated[
        bool,
        Meta(
            description="For a direct cable: KV for another machine is not encrypted, only "
            "authenticated (tcp; zmq and nixl do neither), which is faster. The receiver must be "
            "started with --plain-data, too."
        ),
    ] = False

    def __post_init__(self) -> None:
        self.addresses()  # raises
        if self.token_file and not self.token:
            msgspec.structs.force_setattr(self, "token", token_in(self.token_file))
        if self.stall_timeout <= 0:
            raise ValueError("stall_timeout must be above 0 seconds")
        if self.queue_timeout < 0:
            raise ValueError("queue_timeout must be at least 0 seconds")
        if self.streams != "auto" and not 0 < self.streams <= 16:
            raise ValueError('streams must be 1 to 16, or "auto"')
        if not 1 <= self.shadow_chunk <= 65536:
            raise ValueError("shadow_chunk must be 1 to 65536 tokens")
        if self.staging_mib < 16:
            raise ValueError("staging_mib must be at least 16")
        if self.offload_threshold < 0:
            raise ValueError("offload_threshold must be at least 0 tokens")
        if self.min_output_tokens < 2:
            raise ValueError("min_output_tokens must be at least 2")

    @property
    def slow_streams(self) -> int:
        """Connections that a worker's blocks are spread over where quantising them or the link
        limits that: "auto" makes a second one for what is faster."""
        return 1 if self.streams == "auto" else self.streams

    @property
    def most_streams(self) -> int:
        """Connections that there may be at once."""
        return 2 if self.streams == "auto" else self.streams

    def addresses(self) -> dict[str, tuple[str, int]]:
        """Host and port of each receiver that is given, by how it is spelled; none where they are
        to be discovered. Raises ValueError for what is no address."""
        return parse_addresses(self.receiver)


def parse_addresses(text: str) -> dict[str, tuple[str, int]]:
    """Host and port of each address in a list with commas, by how it is spelled. Raises ValueError
    as ``parse_address`` does, and for more than MOST_RECEIVERS."""
    given = [one.strip() for one in text.split(",")] if text else []
    if len(given) > MOST_RECEIVERS:
        raise ValueError(f"receiver names {len(given)} receivers; {MOST_RECEIVERS} is the most")
    return {one: parse_address(one) for one in given}


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``host``, ``host:port``, ``[IPv6]``, ``[IPv6]:port`` or a bare IPv6 address.

    The port is DEFAULT_PORT where none is given. Raises ValueError quoting anything else.
    """
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        colon, port = rest[:1], rest[1:]
        good = bool(bracket) and colon in ("", ":") and _is_ipv6(host)
    elif text.count(":") > 1:
        host, colon, port, good = text, "", "", _is_ipv6(text)
    else:
        host, colon, port = text.partition(":")
        good = re.fullmatch(r"[\w.-]+", host) is not None
    if colon:
        good = good and re.fullmatch(r"[0-9]{1,5}", port) is not None
    number = int(port) if good and colon else DEFAULT_PORT
    if not good or not 0 < number < 65536:
        raise ValueError(
            f"receiver must be host:port, not {text!r} (port {DEFAULT_PORT} unless the receiver "
            "was started with --port; IPv6 addresses in brackets)"
        )
    return host, number


def _is_ipv6(text: str) -> bool:
    try:
        return bool(ipaddress.IPv6Address(text))
    except ValueError:
        return False


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
