"""Which clients' caches were compared with this receiver's own, and what that gave.

What was the same stays the same for as long as both sides' models, weights and software do: it is
kept in a file. What differed is compared again by the next receiver.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import msgspec

from mlx_receiver import plugins
from mlx_receiver.decode.jobs import Verdict
from mlx_receiver.files import write_whole
from mlx_receiver.wire import fingerprint
from mlx_receiver.wire.handshake import Introduction
from mlx_receiver.wire.layout import CacheLayout
from mlx_receiver.wire.messages import PROTOCOL_VERSION

logger = logging.getLogger(__name__)

#: Comparisons that the file remembers; a user has a handful.
_KEPT: Final = 256

_PACKAGES: Final = ("mlx", "mlx-lm", "vllm-mac-decode")


class Proofs:
    """Thread-safe."""

    def __init__(self, model: Path, dtype: str, file: Path) -> None:
        """Of the model in that folder, decoded in ``dtype``; ``file`` remembers."""
        self._file = file
        weights = fingerprint.of_folder(model)
        # Unknown weights may be others at the next start.
        known = weights or uuid.uuid4().hex
        self._own = [
            known, dtype, PROTOCOL_VERSION, *map(_version, _PACKAGES), *plugins.packages(),
        ]  # fmt: skip
        self._lasting = bool(weights)
        self._lock = threading.Lock()
        self._known: dict[str, Verdict] = {}

    def about(self, peer: Introduction, key: str) -> str:
        """The name of what comparing this client's cache gives; ``key`` is its own: what one says
        of its weights is not held against others, nor for them."""
        said = [key, peer.signature, peer.layout, peer.engine, peer.weights]
        # Without a fingerprint it may be another model as soon as the process is another.
        said += [peer.fingerprint or peer.client]
        return hashlib.sha256(msgspec.msgpack.encode([said, self._own])).hexdigest()

    def verdict(self, peer: Introduction, key: str) -> Verdict | None:
        """What comparing gave before; None where nothing was compared."""
        name = self.about(peer, key)
        with self._lock:
            if name not in self._known and self._lasting and peer.fingerprint:
                text = self._read().get(name)
                if text is not None:
                    self._known[name] = Verdict(True, text)
            return self._known.get(name)

    def learn(self, peer: Introduction, key: str, verdict: Verdict) -> None:
        """Remember what comparing gave."""
        name = self.about(peer, key)
        with self._lock:
            self._known[name] = verdict
            if verdict.same and self._lasting and peer.fingerprint:
                self._write({**self._read(), name: verdict.text})

    def _read(self) -> dict[str, str]:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=dict[str, str])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            logger.debug("%s cannot be read: %s", self._file, error)
            return {}

    def _write(self, proofs: dict[str, str]) -> None:
        kept = dict(list(proofs.items())[-_KEPT:])
        try:
            write_whole(self._file, msgspec.json.format(msgspec.json.encode(kept)))
        except OSError as error:
            logger.debug("%s cannot be written: %s", self._file, error)


def proof_prompt(layout: CacheLayout, vocab_size: int, context: int) -> list[int]:
    """Tokens to compare with: from all over the vocabulary, always the same ones, and long enough
    to fill a short window, and for half of one beyond it: a quarter of a part's tokens may not
    count (``decode.proof``), and only those tell whether the window is the same."""
    windows = [part.window or part.chunk for layer in layout.layers for part in layer.parts]
    shortest = min(filter(None, windows), default=0)
    length = shortest + max(64, shortest // 2) if shortest <= 256 else 64
    # Knuth's multiplier spreads any few numbers over their range.
    return [2654435761 * (n + 1) % (1 << 32) % vocab_size for n in range(min(length, context - 2))]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
