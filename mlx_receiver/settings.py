"""What a receiver is told at its start."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from mlx_receiver.options import token_in

_UNITS: Final = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_MAX_PORT: Final = 65_535

#: What ``--dtype`` takes; ``auto`` leaves the weights as they are stored.
_DTYPES: Final = ("auto", "bfloat16", "float16", "float32")

#: Where HTTP is served unless another port was chosen.
DEFAULT_HTTP_PORT: Final = 7791

#: Begins the names of the variables that set options.
ENV_PREFIX: Final = "MLX_RECEIVER_"


class SettingsError(Exception):
    """A setting that cannot work; the text names the option."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Options of ``mlx-receiver start``, and nowhere else: ``options`` makes the command line, the
    environment and the documentation of them.

    ``http_port`` None is no HTTP; ``kv_memory`` is in bytes, None for a share of what the machine
    has.
    """

    model: Annotated[
        str,
        Meta(
            description="A model folder or Hugging Face id. Without one: whichever the first vLLM "
            "that connects serves."
        ),
    ] = ""
    models: Annotated[
        str,
        Meta(description="Without --model: a folder of model folders, looked up by their names."),
    ] = ""
    model_map: Annotated[
        str,
        Meta(
            description="Without --model: VLLM_NAME=MODEL, separated by commas, where this machine "
            "shall load another one (a conversion for MLX)."
        ),
    ] = ""
    host: Annotated[
        str,
        Meta(
            description="Address to listen on; * is every one of this machine, 127.0.0.1 the "
            "machine itself only."
        ),
    ] = "*"
    port: Annotated[int, Meta(description="Control port, the one vLLM is told; 0: any.")] = 7790
    data_port: Annotated[
        int,
        Meta(description="Port for KV blocks, and those after it for further transports; 0: any."),
    ] = 0
    transport: Annotated[
        str,
        Meta(description="Data transports to offer, e.g. tcp,zmq (nixl where it is installed)."),
    ] = "tcp"
    plain_data: Annotated[
        bool,
        Meta(
            description="For a direct cable: KV from other machines is not encrypted, only "
            "authenticated (tcp; zmq and nixl do neither), which is faster. vLLM's side must say "
            "plain_data, too."
        ),
    ] = False
    http_port: Annotated[
        int | None,
        Meta(
            description="OpenAI API, health, metrics; 0: any port, -1: no HTTP.",
            extra={"type": int},
        ),
    ] = DEFAULT_HTTP_PORT
    token: Annotated[
        str,
        Meta(
            description="Shared secret of both sides, instead of pairing; it never travels.",
            extra={"variable": "MAC_DECODE_TOKEN"},
        ),
    ] = ""
    token_file: Annotated[
        str,
        Meta(
            description="A file that holds the token: a command line can be read by others.",
            extra={"variable": "MAC_DECODE_TOKEN_FILE"},
        ),
    ] = ""
    discovery: Annotated[
        bool,
        Meta(description="Announce this receiver on the network (multicast DNS)."),
    ] = True
    api_key: Annotated[str, Meta(description="Key that clients of the OpenAI API must send.")] = ""
    allowed_hosts: Annotated[
        str,
        Meta(
            description="Names of this machine that HTTP clients may use besides its addresses, "
            "localhost and *.local, separated by commas."
        ),
    ] = ""
    served_model_name: Annotated[
        str, Meta(description="The model's name in the OpenAI API, if not that of --model.")
    ] = ""
    prefill: Annotated[
        str,
        Meta(
            description="Front door: the URL of a vLLM with mac_decode that prefills long prompts."
        ),
    ] = ""
    prefill_min_tokens: Annotated[int, Meta(description="Shorter prompts are prefilled here.")] = (
        512
    )
    prefill_timeout: Annotated[
        float, Meta(description="Seconds after which a prompt is prefilled here after all.")
    ] = 60.0
    prefill_api_key: Annotated[str, Meta(description="The API key of that vLLM.")] = ""
    dtype: Annotated[
        str,
        Meta(description="Cast the weights: auto (as stored), bfloat16, float16 or float32."),
    ] = "auto"
    kv_memory: Annotated[
        int | None,
        Meta(
            description="Memory for received KV, e.g. 24GB; auto: a share of what the model "
            "leaves.",
            extra={"type": str, "default": "auto"},
        ),
    ] = None
    prompt_cache: Annotated[
        bool,
        Meta(
            description="Keep the KV of texts that have ended, in memory that nobody needs: of a "
            "prompt that begins like one of them only the rest is sent."
        ),
    ] = True
    kv_disk: Annotated[
        str,
        Meta(
            description="A folder for that KV, too, which survives a restart. Whoever can read it "
            "can reconstruct the texts."
        ),
    ] = ""
    kv_disk_size: Annotated[
        int,
        Meta(
            description="What that folder may hold, e.g. 200GB; what was used longest ago goes.",
            extra={"type": str, "default": "50GB"},
        ),
    ] = 50 << 30
    profile: Annotated[
        bool,
        Meta(
            description="Measure once, while nothing is decoded, how fast this machine is with the "
            "model; what was measured before is used in any case."
        ),
    ] = True
    max_sessions: Annotated[int, Meta(description="Sessions open at once.")] = 64
    max_batch: Annotated[int, Meta(description="Sessions decoded at once.")] = 32

    @classmethod
    def typed(cls, options: dict[str, Any]) -> Settings:
        """The settings that somebody has typed. Raises SettingsError."""
        values = dict(options)
        values["http_port"] = None if values["http_port"] < 0 else values["http_port"]
        memory = values["kv_memory"]
        values["kv_memory"] = None if memory == "auto" else parse_bytes(memory)
        values["kv_disk_size"] = parse_bytes(values["kv_disk_size"])
        if values["token_file"] and not values["token"]:
            try:
                values["token"] = token_in(values["token_file"])
            except ValueError as error:
                raise SettingsError(str(error)) from None
        settings = cls(**values)
        settings.check()
        return settings

    @property
    def pairs(self) -> bool:
        """Whether machines must be paired with this one: others reach it, and there is no token."""
        return not self.token and not is_loopback(self.host)

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
        check_dtype(self.dtype)
        if self.models and not Path(self.models).expanduser().is_dir():
            raise SettingsError(f"--models {self.models} is no folder")
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
        if self.kv_disk and not self.prompt_cache:
            raise SettingsError("--kv-disk keeps nothing with --no-prompt-cache")
        if self.kv_disk_size < 1:
            raise SettingsError("--kv-disk-size must be positive")


def check_dtype(dtype: str) -> None:
    """Raise SettingsError for what weights cannot be cast to."""
    if dtype not in _DTYPES:
        raise SettingsError(f"--dtype {dtype} is not one of {', '.join(_DTYPES)}")


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
