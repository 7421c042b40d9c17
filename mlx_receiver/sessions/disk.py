"""A second tier for what texts leave: KV on disk, in blocks that later texts share.

A block holds the K and V of ``BLOCK`` tokens in all layers that keep every token. Its file is named
after everything that these depend on: the model, its layout and the versions, whose texts they are,
and all tokens up to its end; and after its own checksum. So branches of a conversation share what
they have in common, a turn writes only what is new, and there is no index that could be wrong.

Files appear whole, under their final names, for this user alone. One that cannot be written or
read costs a miss.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import secrets
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from mlx_receiver.metrics import Metrics
from mlx_receiver.wire.layout import CacheLayout
from mlx_receiver.wire.seldom import Seldom

logger = logging.getLogger(__name__)

#: Tokens of a block.
BLOCK: Final = 256

#: Changes with what a file holds.
_FORMAT: Final = 1

_SUFFIX: Final = ".safetensors"
_UNFINISHED: Final = ".part"
_NAME: Final = re.compile(r"[0-9a-f]{40}-[0-9a-f]{16}\.safetensors")
_UNFINISHED_NAME: Final = re.compile(r"[0-9a-f]{40}-[0-9a-f]{8}\.part")
#: Whoever has locked it has the folder.
_LOCK: Final = ".mlx-receiver.lock"

#: Texts that wait to be written; of more, the oldest are not.
_MOST_WAITING: Final = 16

#: Seconds without writing after a disk that was full or failed.
_PAUSE: Final = 60.0

#: Rows of a part ``[heads, tokens, width]`` by layer and part: of some of a text's tokens.
Rows = Mapping[tuple[int, int], NDArray[Any]]

#: Gives a text's rows from one token to another, as carriers; None once they are gone.
ReadRows = Callable[[int, int], Rows | None]


@dataclass(slots=True)
class _File:
    path: Path
    nbytes: int
    used: float


@dataclass(frozen=True, slots=True)
class _Text:
    partition: str
    tokens: NDArray[np.int32]
    rows: ReadRows


class DiskTier:
    """See the module's text. Thread-safe; files are written by a thread of its own."""

    def __init__(self, folder: Path, limit: int, model: Sequence[str], metrics: Metrics) -> None:
        """At most ``limit`` bytes in ``folder``; ``model`` names all that the numbers depend on.
        Raises OSError, BlockingIOError while another process uses the folder."""
        prepare(folder)
        self._locked = (folder / _LOCK).open("w")
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._locked.close()
            raise
        self._folder = folder
        self._limit = limit
        self._root = _digest(b"", repr((_FORMAT, BLOCK, *model)).encode())
        self._seldom = Seldom(logger)
        self._metrics = metrics
        self._lock = threading.Lock()
        #: By what they hold, the one that was used longest ago first.
        self._files: dict[str, _File] = {}
        self.nbytes = 0
        self._paused_until = 0.0
        self._closing = False
        self._changed = threading.Condition()
        self._waiting: deque[_Text] = deque(maxlen=_MOST_WAITING)
        self._busy = False
        self._find_files()
        self._writer = threading.Thread(target=self._write_all, name="kv-disk", daemon=True)
        self._writer.start()

    def covers(self, partition: str, prompt: Sequence[int]) -> int:
        """How many tokens of the prompt's beginning are there."""
        tokens = np.array(prompt, np.int32)
        with self._lock:
            blocks = 0
            for key in self._keys(partition, tokens):
                if key not in self._files:
                    break
                blocks += 1
        return blocks * BLOCK

    def load(
        self,
        partition: str,
        prompt: Sequence[int],
        into: Callable[[int, Rows], bool],
        wanted: Callable[[], bool] = lambda: True,
    ) -> int:
        """Give ``into`` the rows of the prompt's tokens, a block at a time with its first token, as
        long as they are ``wanted``; it says whether they are what it needs. Returns how many tokens
        there were."""
        tokens = np.array(prompt, np.int32)
        for number, key in enumerate(self._keys(partition, tokens)):
            start = number * BLOCK
            if not wanted():
                return start
            rows = self._read(key, tokens[start : start + BLOCK])
            if rows is None:
                return start
            if not into(start, rows):
                self._drop(key, "it is of another shape")
                return start
        return len(tokens) - len(tokens) % BLOCK

    def save(self, partition: str, tokens: NDArray[np.int32], rows: ReadRows) -> None:
        """Write a text's blocks in the background, those that are not there."""
        with self._changed:
            self._waiting.append(_Text(partition, tokens, rows))
            self._changed.notify()

    def flush(self, seconds: float) -> bool:
        """Wait until everything is written, but not longer; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, seconds)

    def close(self, seconds: float = 1.0) -> None:
        """Write nothing any more; a block that is being written is finished, or was never there."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._writer.join(seconds)
        self._locked.close()

    # --- the writer's thread ----------------------------------------------------------------------

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return
                text, self._busy = self._waiting.popleft(), True
            try:
                self._write_text(text)
            except Exception:
                logger.exception("a text's KV could not be written to disk")
            del text  # it would keep the text's memory until there is another

    def _write_text(self, text: _Text) -> None:
        keys = list(self._keys(text.partition, text.tokens))
        # The beginning was used last of all, since the rest is worth nothing without it.
        for key in reversed(keys):
            self._use(key)
        for number, key in enumerate(keys):
            if self._closing or time.monotonic() < self._paused_until:
                return
            with self._lock:
                there = key in self._files
            if there:
                continue
            start = number * BLOCK
            rows = text.rows(start, start + BLOCK)
            if rows is None:
                return
            if not self._write(key, text.tokens[start : start + BLOCK], rows, set(keys)):
                return

    def _write(self, key: str, tokens: NDArray[np.int32], rows: Rows, spared: Set[str]) -> bool:
        """Write one block, if that needs no room of those that are spared; whether it is there."""
        from safetensors.numpy import save

        named = {f"{layer}.{part}": array for (layer, part), array in rows.items()}
        data = save({"tokens": tokens, **named})
        if not self._make_room(len(data), spared):
            return False
        path = self._folder / f"{key}-{xxhash.xxh3_64_hexdigest(data)}{_SUFFIX}"
        unfinished = self._folder / f"{key}-{secrets.token_hex(4)}{_UNFINISHED}"
        try:
            handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            unfinished.rename(path)
        except OSError as error:
            self._paused_until = time.monotonic() + _PAUSE
            self._seldom.warning(
                "KV cannot be written to %s (%s): nothing is for %.0f s",
                self._folder,
                error.strerror,
                _PAUSE,
            )
            unfinished.unlink(missing_ok=True)
            return False
        with self._lock:
            self._files[key] = _File(path, len(data), time.time())
            self._count(len(data))
        return True

    def _make_room(self, nbytes: int, spared: Set[str] = frozenset()) -> bool:
        """Remove what was used longest ago; False where that does not help."""
        while self.nbytes + nbytes > self._limit:
            with self._lock:
                oldest = next((key for key in self._files if key not in spared), None)
            if oldest is None or nbytes > self._limit:
                return False
            self._drop(oldest)
        return True

    # --- files ------------------------------------------------------------------------------------

    def _find_files(self) -> None:
        """What earlier runs left."""
        found = []
        for entry in os.scandir(self._folder):
            if not entry.is_file(follow_symlinks=False):
                continue
            # Whatever else is in the folder is not ours.
            if _UNFINISHED_NAME.fullmatch(entry.name):
                Path(entry.path).unlink(missing_ok=True)
            elif _NAME.fullmatch(entry.name):
                status = entry.stat()
                found.append(_File(Path(entry.path), status.st_size, status.st_mtime))
        for file in sorted(found, key=lambda file: file.used):
            key = file.path.stem.partition("-")[0]
            if key in self._files:
                self._files.pop(key).path.unlink(missing_ok=True)
            self._files[key] = file
        self._count(sum(file.nbytes for file in self._files.values()))
        self._make_room(0)

    def _read(self, key: str, tokens: NDArray[np.int32]) -> Rows | None:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        with self._lock:
            file = self._files.get(key)
        if file is None:
            return None
        try:
            data = file.path.read_bytes()
        except OSError as error:
            self._drop(key, str(error.strerror))
            return None
        if xxhash.xxh3_64_hexdigest(data) != file.path.stem.partition("-")[2]:
            self._drop(key, "its checksum is wrong")
            return None
        try:
            arrays = load(data)
            same = bool(np.array_equal(arrays.pop("tokens"), tokens))
            rows = {_place(name): array for name, array in arrays.items()}
        except (SafetensorError, KeyError, ValueError) as error:
            self._drop(key, str(error))
            return None
        if not same:
            self._drop(key, "it is of other tokens")
            return None
        self._use(key)
        return rows

    def _use(self, key: str) -> None:
        with self._lock:
            file = self._files.pop(key, None)
            if file is None:
                return
            self._files[key] = file
        try:
            os.utime(file.path)
        except OSError as error:
            self._drop(key, str(error.strerror))

    def _drop(self, key: str, why: str = "") -> None:
        with self._lock:
            file = self._files.pop(key, None)
            if file is None:
                return
            self._count(-file.nbytes)
        if why:
            self._seldom.warning("KV on disk is not used: %s: %s", file.path.name, why)
        try:
            file.path.unlink(missing_ok=True)
        except OSError as error:
            self._seldom.warning("%s cannot be removed: %s", file.path, error.strerror)

    def _count(self, nbytes: int) -> None:
        self.nbytes += nbytes
        self._metrics.disk_bytes.set(self.nbytes)

    def _keys(self, partition: str, tokens: NDArray[np.int32]) -> Iterator[str]:
        """Of each whole block."""
        key = _digest(self._root, partition.encode())
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            key = _digest(key, tokens[start : start + BLOCK].tobytes())
            yield key.hex()


def prepare(folder: Path) -> None:
    """Make sure that files can be written to it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryFile(dir=folder):
        pass


def depends_on(layout: CacheLayout, *names: str) -> list[str]:
    """For ``DiskTier``: the model's layout, and whatever else the numbers depend on."""
    return [msgspec.json.encode(layout).decode(), *names]


def _digest(before: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(before + data, digest_size=20).digest()


def _place(name: str) -> tuple[int, int]:
    layer, _, part = name.partition(".")
    return int(layer), int(part)
