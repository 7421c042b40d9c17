"""Files that others may read while they are written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def write_whole(file: Path, content: bytes) -> None:
    """Have the content there, all of it or none, for this user only. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, scratch = tempfile.mkstemp(dir=file.parent, prefix=".")  # with mode 0600
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(scratch, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise
