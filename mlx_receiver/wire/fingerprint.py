"""Which weights a model has, without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

#: Pieces of each file that are looked at, and their bytes.
_PIECES: Final = 16
_PIECE_BYTES: Final = 4096

_WEIGHTS: Final = ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth")


def of_folder(folder: Path) -> str:
    """A fingerprint of the model in a folder: its config.json, and of every file of weights the
    name, the size and pieces from all over it. "" when there are none, or they cannot be read.

    Another revision, fine-tune or quantisation has another one; files that were only copied keep
    theirs.
    """
    found = hashlib.sha256()
    try:
        files = sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)})
        if not files:
            return ""
        found.update((folder / "config.json").read_bytes())
        for file in files:
            size = file.stat().st_size
            found.update(f"\0{file.name}\0{size}\0".encode())
            with file.open("rb") as weights:
                for piece in range(_PIECES):
                    weights.seek(piece * max(0, size - _PIECE_BYTES) // (_PIECES - 1))
                    found.update(weights.read(_PIECE_BYTES))
    except OSError:
        return ""
    return found.hexdigest()
