"""The checks that use MLX, in a process of their own: it prints a JSON object a line.

``{"begin": check}`` comes before each, so that the parent knows which of them ended the process.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from mlx_receiver.checks.finding import Finding, unchecked
from mlx_receiver.decode.blas import use_fast_blas


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """The next finding is this check's."""

    check: str


class Found(msgspec.Struct, frozen=True, tag="found"):
    """What a check says."""

    finding: Finding


class Facts(msgspec.Struct, frozen=True, tag="facts"):
    """What the commands for both sides need: what vLLM calls the model, "" if that is unknown."""

    vllm_name: str


Line = Begin | Found | Facts


def lines(model: str) -> Iterator[Line]:
    """Every line; ``model`` is a folder or a Hugging Face id, or empty."""
    from mlx_receiver.checks import decoding, transfer
    from mlx_receiver.checks.small_model import PROMPT, write
    from mlx_receiver.decode.model import ModelError, find_model, load_model

    yield from _guarded("Metal", decoding.check_device)
    yield from _guarded("threads", decoding.check_threads)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        small = find_model(folder)
        yield from _guarded(
            "tokens", lambda: decoding.check_tokens("tokens", load_model(small).model, PROMPT)
        )
        yield from _guarded(
            "recovery", lambda: decoding.check_recovery(small, decoding.provoke_error)
        )
    yield from _guarded("loopback", transfer.check_loopback)
    if not model:
        yield Found(unchecked("model", "--model M looks at its size and its tokens, too"))
        return
    from mlx_receiver.checks.users_model import check_fit, check_users_tokens

    yield Begin("model")
    try:
        source = find_model(model)
    except ModelError as error:
        yield Found(Finding("model", "wrong", str(error), "Check --model"))
        return
    yield Facts(source.vllm_name or "")
    fit = check_fit(source)
    yield Found(fit)
    if fit.state != "wrong":
        yield from _guarded("model's tokens", lambda: check_users_tokens(source))


def _guarded(check: str, look: Callable[[], Finding]) -> Iterator[Line]:
    yield Begin(check)
    try:
        yield Found(look())
    except Exception as error:
        seen = f"{type(error).__name__}: {' '.join(str(error).split())}"
        yield Found(Finding(check, "wrong", seen, "Report it, with --json's output"))


def main(arguments: list[str]) -> None:
    """``python -m mlx_receiver.checks.child [MODEL]``."""
    use_fast_blas()
    # What goes wrong is a finding; a line of our own log would stand in the middle of the report.
    logging.getLogger("mlx_receiver").addHandler(logging.NullHandler())
    # Libraries print to where they like; the lines have the standard output alone.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    encoder: Any = msgspec.json.Encoder()
    for line in lines(arguments[0] if arguments else ""):
        out.write(encoder.encode(line) + b"\n")
        out.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
