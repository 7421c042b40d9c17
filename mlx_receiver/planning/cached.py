"""Profiles that were measured before, in files of the user's cache folder.

Each is named by everything that it depends on: the machine, the versions of what computes, and the
model. A file is checked before it is used, and what cannot be read is measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import platformdirs
from msgspec import Meta

from mlx_receiver.files import write_whole
from mlx_receiver.wire import trust
from mlx_receiver.wire.messages import WireError
from mlx_receiver.wire.profile import Profile

logger = logging.getLogger(__name__)

#: Where the folder is, if not where the system keeps a user's caches.
CACHE_VARIABLE: Final = "MAC_DECODE_CACHE_DIR"

#: Of the files' form, and of how is measured: others are measured again.
_VERSION: Final = 1
#: Files that are kept, the latest ones.
_KEPT: Final = 64
_MOST_BYTES: Final = 1 << 16

#: A profile that misses what it was made of by more was measured beside something else.
MOST_ERROR: float = 0.25

Side = Literal["receiver", "vllm"]

_Text = Annotated[str, Meta(max_length=4096)]


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """One file. ``made`` is in seconds of the system's clock, ``seconds`` how long measuring took,
    and the errors are the medians of the relative ones that are left (``fit.Fit``)."""

    version: int = _VERSION
    side: Side
    key: Annotated[dict[_Text, _Text], Meta(max_length=64)]
    profile: Profile
    made: float
    seconds: float = 0.0
    samples: Annotated[int, Meta(ge=0)] = 0
    prefill_error: float = 0.0
    decode_error: float = 0.0

    @property
    def reliable(self) -> bool:
        """Whether it says what the forwards took that it was made of."""
        return max(self.prefill_error, self.decode_error) <= MOST_ERROR

    @property
    def text(self) -> str:
        """For the log."""
        prefill, decode = self.profile.prefill.seconds(1024), self.profile.decode.seconds(1024)
        return (
            f"in {self.seconds:.1f} s: {1024 / max(1e-9, prefill):.0f} tokens/s of a prompt of "
            f"1,024 tokens, {1 / max(1e-9, decode):.1f} tokens/s decoded behind it"
        )


def folder() -> Path:
    """Where the files are."""
    base = os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_path("vllm-mac-decode")
    return Path(base) / "profiles"


def path(side: Side, key: dict[str, str]) -> Path:
    """The file of that side's profile that depends on ``key``."""
    named = msgspec.json.encode([_VERSION, side, sorted(key.items())])
    return folder() / f"{side}-{hashlib.sha256(named).hexdigest()[:24]}.json"


def read(side: Side, key: dict[str, str]) -> Saved | None:
    """What was measured before; None where nothing was, or what is there cannot be used."""
    saved = _load(path(side, key))
    return saved if saved is not None and (saved.side, saved.key) == (side, key) else None


def read_all(side: Side | None = None) -> list[Saved]:
    """All that there are, the latest first."""
    try:
        files = list(folder().glob(f"{side or '*'}-*.json"))
    except OSError:
        return []
    found = [saved for file in files if (saved := _load(file)) is not None]
    return sorted(found, key=lambda saved: saved.made, reverse=True)


def write(saved: Saved) -> Path | None:
    """Keep it, whole or not at all; None, and one line in the log, where that fails, or where it is
    not reliable."""
    if not saved.reliable:
        logger.warning(
            "forwards took so different times (%.0f %% from what fits best) that the profile is "
            "not kept: the machine had other work. It is measured again at the next start",
            100 * max(saved.prefill_error, saved.decode_error),
        )
        return None
    file = path(saved.side, saved.key)
    try:
        write_whole(file, msgspec.json.format(msgspec.json.encode(saved)))
    except OSError as error:
        logger.warning(
            "the profile cannot be kept in %s (%s): it is measured again at the next start",
            file.parent,
            error.strerror,
        )
        return None
    _prune(file.parent)
    return file


def forget(side: Side, key: dict[str, str]) -> None:
    """What was measured is not true any more."""
    with contextlib.suppress(OSError):
        path(side, key).unlink()


def _load(file: Path) -> Saved | None:
    try:
        with file.open("rb") as content:
            packed = content.read(_MOST_BYTES + 1)
        if len(packed) > _MOST_BYTES:
            raise ValueError("it is too large")
        saved = msgspec.json.decode(packed, type=Saved)
        trust.check(saved.profile, 0)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, WireError) as error:  # msgspec's are ValueErrors
        logger.debug("%s cannot be used: %s", file, error)
        return None
    return saved if saved.version == _VERSION else None


def _prune(place: Path) -> None:
    with contextlib.suppress(OSError):
        files = sorted(place.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in files[:-_KEPT]:
            old.unlink()
