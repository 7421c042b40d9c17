"""Is the receiver there, is it ours, does it serve our model, and how fast is the way to it?"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mlx_receiver.pairing.keystore import PairingError
from mlx_receiver.transports.transport import TransportError
from mlx_receiver.wire import messages as m
from mlx_receiver.wire.addresses import Address, resolve, spelled
from mlx_receiver.wire.handshake import Introduction
from mlx_receiver.wire.keys import ClientKeys, of_token
from mlx_receiver.wire.layout import DTYPES, full_attention, is_plain, layout_from_config
from mlx_receiver.wire.signature import ModelSignature, signature_from_config
from vllm_mac_decode.scheduler import candidates
from vllm_mac_decode.settings import DEFAULT_PORT, Settings
from vllm_mac_decode.tools.check.conversation import NAME, Conversation, speaks_zeromq
from vllm_mac_decode.tools.check.finding import Finding, fine, warning, wrong
from vllm_mac_decode.tools.check.transfer import (
    Transfer,
    TransferError,
    interface_to,
    time_transfer,
)

#: Bytes a second below which sending a prompt's KV takes longer than a Spark needs to compute it.
SLOW: Final = 0.6e9
#: The prompt whose transfer is named.
_EXAMPLE_TOKENS: Final = 8192

#: No model: whatever the receiver serves, it says so.
_NO_MODEL: Final = Introduction(
    ModelSignature("", 0, 0, []), full_attention(1, 1, 1, DTYPES[0]), NAME, NAME
)

START: Final = "On the Mac: mlx-receiver start --model MODEL"

#: Seconds in which receivers may announce themselves.
_LOOK_SECONDS: Final = 3.0


class OtherCache(ValueError):
    """The model is one whose cache its config.json does not describe."""


def read_model(name: str) -> Introduction:
    """What vLLM would say of a model folder or Hugging Face id.

    Raises OSError when its config.json is not to be had, ValueError when that does not describe a
    model with KV, OtherCache where it has something else beside.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        if name.startswith((".", "/", "~")):
            raise FileNotFoundError("no such folder")
        try:
            from huggingface_hub import hf_hub_download
        except ModuleNotFoundError:
            raise OSError("huggingface_hub, which vLLM brings along, is not installed") from None
        path = Path(hf_hub_download(name, "config.json")).parent
    config = json.loads((path / "config.json").read_text())
    if not is_plain(config):
        raise OtherCache(f"{name} keeps more than keys and values of each layer")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    layout = layout_from_config(config, dtype if dtype in DTYPES else DTYPES[0])
    return Introduction(signature_from_config(config), layout, NAME, NAME)


def check_model(name: str, model: Introduction) -> Finding:
    """What the model is, and what its KV takes. ``name`` is its folder or id."""
    signature, layout = model.signature, model.layout
    size = layout.bytes_per_token
    return fine(
        "model",
        f"{name}: {signature.model_type}, {len(layout.layers)} layers, {size / 1024:.0f} KiB of KV "
        f"a token in {layout.kv_dtype}",
        kv_bytes_per_token=size,
    )


@dataclass
class _Place:
    """One receiver: its addresses, and the keys that it may want, the likeliest first."""

    name: str
    addresses: list[Address]
    keys: list[ClientKeys]


class ReceiverChecks:
    """The receivers that vLLM would use. ``findings`` says everything about them."""

    def __init__(self, settings: Settings, model: Introduction | None) -> None:
        self._settings = settings
        self._model = model
        self._keys: list[ClientKeys] = []  # of the one that is being looked at
        #: Who took KV, and how: by each address that works.
        self.taken: list[tuple[m.Welcome, Transfer]] = []

    def findings(self) -> Iterator[Finding]:
        """Everything that can be said, receiver by receiver and address by address."""
        places: list[_Place] = []
        try:
            typed = bool(self._settings.receiver)
            yield from self._typed(places) if typed else self._discovered(places)
        except PairingError as error:
            yield wrong("pairing", str(error), "Then try again")
            return
        for place in places:
            yield from self._look_at(place)

    def _typed(self, places: list[_Place]) -> Iterator[Finding]:
        """Those whose addresses are given. Raises PairingError."""
        network = candidates.Typed(self._settings)
        for name, (host, port) in self._settings.addresses().items():
            try:
                addresses = resolve(host, port)
            except OSError as error:
                yield wrong(
                    "name",
                    f"The receiver's host {host} has no address ({error.strerror or error})",
                    "Check the name in --receiver or MAC_DECODE_RECEIVER, or give the address in "
                    "numbers: containers do not know .local names",
                )
                continue
            try:
                keys = [way.keys for way in network.ways(name)]
            except PairingError as error:
                yield wrong("pairing", str(error), "Then check again")
                continue
            places.append(_Place(spelled(host, port), addresses, keys))

    def _discovered(self, places: list[_Place]) -> Iterator[Finding]:
        """Those that announce themselves, else one on this machine. Raises PairingError."""
        with contextlib.closing(candidates.Discovered(self._settings)) as network:
            network.wait(_LOOK_SECONDS)
            for receiver in network.receivers():
                ways = network.ways(receiver)
                announced = receiver != candidates.LOCAL
                if not ways or (places and not announced):
                    continue  # gone; or, where multicast works, it would announce itself
                if announced:
                    yield fine("discovery", f"{ways[0].name} announces itself")
                else:
                    yield warning(
                        "discovery",
                        f"{network.none()}. Looking on this machine",
                        "Name the receiver's address with --receiver if it is another machine",
                    )
                hosts = dict.fromkeys((way.host, way.port) for way in ways)
                addresses = []
                for host in hosts:
                    with contextlib.suppress(OSError):  # an interface that has gone
                        addresses += resolve(*host)
                keys = list(dict.fromkeys(way.keys for way in ways))
                places.append(_Place(ways[0].name, addresses, keys))

    def _look_at(self, place: _Place) -> Iterator[Finding]:
        self._keys = place.keys
        working = []
        for address in place.addresses:
            finding = self._reach(address)
            yield finding
            if finding.state == "fine":
                working.append(address)
        if not working:
            yield wrong(
                "reachable",
                f"No receiver at {place.name}",
                f"{START}; then check --port and the Mac's firewall (System Settings, Network)",
            )
            return
        transfers: dict[Address, Transfer] = {}
        for address in working:
            with self._talk(address) as talk:
                good = True
                for finding in self._greet(talk, address, transfers):
                    yield finding
                    good = good and finding.state != "wrong"
            if not good:
                return
        if len(transfers) > 1:
            yield _route(transfers)

    def _talk(self, address: Address) -> Conversation:
        """A conversation with the keys that the receiver takes, else with the last."""
        for known in self._keys[1:]:
            with Conversation(address, self._keys[0]) as talk:
                if talk.admitted():
                    break
            self._keys = [known, *(k for k in self._keys if k != known)]
        return Conversation(address, self._keys[0])

    def _reach(self, address: Address) -> Finding:
        interface = interface_to(address).text
        through = f" (through {interface})" if interface else ""
        try:
            ours = speaks_zeromq(address)
        except OSError as error:
            reason = error.strerror or str(error)
            return warning(
                "address",
                f"Nothing answers at {address.text}{through}: {reason}",
                "Nothing, if another address works: each of the name's is tried in turn",
            )
        if not ours:
            return warning(
                "address",
                f"What listens at {address.text} is no receiver's control port",
                f"Give the control port, which is {DEFAULT_PORT} unless mlx-receiver was started "
                "with --port (not the HTTP port)",
            )
        return fine("address", f"{address.text} answers{through}")

    def _greet(
        self, talk: Conversation, address: Address, transfers: dict[Address, Transfer]
    ) -> Iterator[Finding]:
        """Token, version, model and, where these are right, the data path."""
        admitted = talk.admitted()
        if admitted is None:
            yield wrong("token", f"{address.text} does not finish the handshake", START)
            return
        if not admitted:
            given = "The token is wrong" if self._settings.token else "No token was given"
            yield wrong(
                "token",
                f"{given}, the receiver at {address.text} is not paired with this machine, or it "
                "has another version of the protocol",
                "Pair the two (`mlx-receiver pair` on the Mac), or export MAC_DECODE_TOKEN=... "
                "with the Mac's --token; the same vllm-mac-decode on both machines",
            )
            return
        if self._settings.token:
            admitted_by = "The token is right"
        elif self._keys[0] == of_token(""):
            admitted_by = "No token is needed"
        else:
            admitted_by = "The keys of the pairing are right"
        yield fine("token", f"{admitted_by} at {address.text}")
        try:
            answer = talk.hello(self._model or _NO_MODEL)
            finding = self._answered(answer)
            yield finding
            if isinstance(answer, m.Welcome) and finding.state == "fine":
                yield self._timed(talk, answer, address, transfers)
        except m.WireError as error:
            yield wrong("protocol", f"{address.text}: {error.reason}", _REMEDIES[m.E_VERSION])

    def _answered(self, answer: m.ReceiverMessage | None) -> Finding:
        match answer:
            case None:
                return wrong(
                    "model",
                    "The receiver does not answer yet: it is still loading its model",
                    "Wait until it says that it serves",
                )
            case m.Rejected(m.E_MODEL, reason) if self._model is None:
                served = reason.partition(", which is not")[0]
                return warning(
                    "model",
                    f"Protocol {m.PROTOCOL_VERSION}; {served}. The data path was not tried: it "
                    "opens for clients of the same model only",
                    "Add --model with the name that vllm serve will get",
                )
            case m.Rejected(code, reason):
                return wrong("model", f"The receiver refuses: {reason}", _REMEDIES.get(code, ""))
            case m.Welcome(endpoints=endpoints):
                offered = [endpoint.transport for endpoint in endpoints]
                if self._settings.transport not in offered:
                    return wrong(
                        "transport",
                        f"The receiver offers no transport {self._settings.transport}, only "
                        f"{', '.join(offered)}",
                        f"export MAC_DECODE_TRANSPORT={offered[0] if offered else 'tcp'}",
                    )
                return fine(
                    "model",
                    f"The receiver ({answer.engine}) serves the same model, {answer.model}, up to "
                    f"{answer.max_tokens} tokens; protocol {m.PROTOCOL_VERSION}",
                )
            case _:
                return wrong(
                    "protocol",
                    f"The receiver answers a greeting with {type(answer).__name__}",
                    _REMEDIES[m.E_VERSION],
                )

    def _timed(
        self,
        talk: Conversation,
        welcome: m.Welcome,
        address: Address,
        transfers: dict[Address, Transfer],
    ) -> Finding:
        assert self._model is not None
        try:
            done = time_transfer(
                talk,
                welcome,
                address,
                self._settings.transport,
                self._settings.plain_data,
                self._model.layout,
            )
        except TransportError as error:
            ports = ", ".join(f"{e.port} ({e.transport})" for e in welcome.endpoints)
            return wrong(
                "data path",
                f"The data path does not open: {error}",
                f"Let port {ports} through the firewall; mlx-receiver's --data-port keeps it fixed",
            )
        except TransferError as error:
            return warning(
                "data path",
                f"The data path over {address.text} opens, but was not timed: {error}",
                "Try again when the receiver has less to do",
            )
        transfers[address] = done
        self.taken.append((welcome, done))
        interface = interface_to(address)
        through = f" through {interface.text}" if interface.name else ""
        seen = (
            f"{done.text} over {address.text}{through}: {done.nbytes >> 20} MiB of KV until they "
            "were in the receiver's memory"
        )
        figures: dict[str, str | float] = {
            "address": address.text,
            "interface": interface.text,
            "bytes": done.nbytes,
            "seconds": round(done.seconds, 4),
            "mtu": done.mtu,
        }
        if done.rate >= SLOW:
            return fine("data path", seen, **figures)
        slow = "Wi-Fi is" if interface.wifi else "This way is"
        seconds = self._model.layout.nbytes(_EXAMPLE_TOKENS) / done.rate
        return warning(
            "data path",
            seen,
            f"{slow} slow: the KV of {_EXAMPLE_TOKENS:,} tokens takes {seconds:.1f} s. A direct "
            "10 Gbit/s cable carries 1.2 GB/s",
            **figures,
        )


def _route(transfers: dict[Address, Transfer]) -> Finding:
    """Which address vLLM will take for the KV: it measures them, too."""
    best = max(transfers, key=lambda address: transfers[address].rate)
    others = ", ".join(address.text for address in transfers if address != best)
    return fine(
        "route",
        f"KV will go to {best.text} ({transfers[best].text}), not to {others}",
        address=best.text,
    )


_REMEDIES: Final = {
    m.E_VERSION: "Install the same vllm-mac-decode on both machines",
    m.E_MODEL: "Start both sides with the same model",
    m.E_SHUTDOWN: "Start the receiver again",
    m.E_UNSUPPORTED: "See the receiver's output",
}
