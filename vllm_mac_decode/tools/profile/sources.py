"""Where a side's profile is: at the receiver's HTTP address, or in this machine's files."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import msgspec

from mlx_receiver.planning import cached
from mlx_receiver.planning.shown import Shown
from mlx_receiver.wire.profile import Profile
from vllm_mac_decode.tools.receiver_http import HttpError, NoAnswer, get


class ProfileError(Exception):
    """A profile cannot be shown; the text says why and what to do."""


class _Health(msgspec.Struct):
    paths: dict[str, str] = {}


@dataclass(frozen=True)
class Known:
    """One side: its profile, or (None) why there is none; ``origin`` says in words how it is
    known."""

    side: cached.Side
    profile: Profile | None
    origin: str
    saved: cached.Saved | None = None
    errors: dict[str, dict[str, float]] | None = None

    @property
    def title(self) -> str:
        """For people."""
        return "vLLM" if self.side == "vllm" else "receiver"


def both(receiver_http: str, api_key: str = "") -> list[Known]:
    """vLLM's side and the receiver's. Raises ProfileError for an address that is none, and for a
    key that is not the receiver's."""
    return [vllm(), receiver(receiver_http, api_key)]


def vllm() -> Known:
    """What vLLM has measured on this machine, the latest."""
    found = cached.read_all("vllm")
    if not found:
        return Known(
            "vllm", None,
            f"nothing in {cached.folder()}: a vLLM with mac_decode measures itself when it is idle "
            "and connected to a receiver",
        )  # fmt: skip
    return Known("vllm", found[0].profile, told(found[0]), found[0])


def receiver(base: str, api_key: str = "") -> Known:
    """What the receiver says of itself; where none answers, what one has measured here. Raises
    ProfileError."""
    said = shown(base, api_key)
    if said is None:
        missing = f"no receiver answers at {base.rstrip('/')}"
        found = cached.read_all("receiver")
        if not found:
            return Known("receiver", None, f"{missing}: --receiver-http names another")
        return Known(
            "receiver", found[0].profile, f"{told(found[0])}, on this machine; {missing}", found[0]
        )
    if said.profile is None:
        why = "it is being measured" if said.measuring else "it has not been measured"
        return Known("receiver", None, f"{why}: `mlx-receiver profile` does, or an idle receiver")
    origin = told(said.saved) if said.saved is not None else ""
    if said.profile.source == "live":
        origin = ", ".join(filter(None, [origin, "corrected by what it has decoded since"]))
    return Known("receiver", said.profile, origin, said.saved, said.errors)


def shown(base: str, api_key: str = "") -> Shown | None:
    """What the receiver there says of its speed and links; None where none answers. Raises
    ProfileError for an address that is none, and for a key that is not the receiver's."""
    try:
        return get(base.rstrip("/"), "/profile", Shown, api_key)
    except NoAnswer:
        return None
    except HttpError as error:
        raise ProfileError(str(error)) from None


def links(base: str, api_key: str = "") -> dict[str, str]:
    """By vLLM's name for itself: the way that its blocks take to the receiver and what was measured
    there, in words; empty where nobody says it."""
    try:
        return get(base.rstrip("/"), "/health", _Health, api_key).paths
    except HttpError:
        return {}


def told(saved: cached.Saved) -> str:
    """How a profile came about, in words."""
    try:
        when = datetime.datetime.fromtimestamp(saved.made).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):
        when = "at a time that is none"
    versions = " ".join(
        f"{name} {version.removeprefix(name).strip()}"
        for name, version in saved.key.items()
        if name in ("vllm", "mlx", "mlx-lm")
    )
    dtype = saved.key.get("dtype", "")
    return (
        f"measured {when} in {saved.seconds:.1f} s with {versions} ({dtype}), {saved.samples} "
        f"samples, of which half are within {100 * saved.prefill_error:.1f} % (prefill) and "
        f"{100 * saved.decode_error:.1f} % (decode)"
    )
