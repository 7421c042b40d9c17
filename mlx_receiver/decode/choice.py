"""Which model of this machine's is the one that a vLLM serves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from mlx_receiver.settings import Settings, SettingsError
from mlx_receiver.wire.messages import E_MODEL, WireError
from mlx_receiver.wire.seldom import printable

#: What a hub is asked for, and nothing else.
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def choose(settings: Settings, asked: str) -> str:
    """A folder or a Hugging Face id for the model that vLLM calls ``asked``.

    ``--model-map`` comes first, then a folder of the same name in ``--models``, then the hub.
    Raises WireError (``model``) saying what to do where there is none.
    """
    mapped = parse_map(settings.model_map).get(asked)
    if mapped is not None:
        return mapped
    name = asked.rstrip("/").rpartition("/")[2]
    if settings.models and re.fullmatch(r"[\w.-]+", name) and name not in (".", ".."):
        folder = Path(settings.models).expanduser() / name
        if (folder / "config.json").is_file():
            return str(folder)
    if _HUB_ID.fullmatch(asked) and ".." not in asked:
        return asked
    if not asked:
        raise WireError(
            E_MODEL,
            "this receiver has no model, and the client does not say which one it serves: start it "
            "with --model",
        )
    raise WireError(
        E_MODEL,
        f"this receiver has no model that stands for {printable(asked)}: start it with --model, "
        f"with --models DIR where DIR has a folder {printable(name)}, or with "
        f"--model-map {printable(asked)}=OWNER/NAME",
    )


def parse_map(text: str) -> dict[str, str]:
    """``vLLM's name=ours,...``. Raises SettingsError."""
    found = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        theirs, equals, ours = pair.partition("=")
        if not (equals and theirs.strip() and ours.strip()):
            raise SettingsError(
                f"--model-map {pair!r} is not VLLM_NAME=MODEL, e.g. "
                "nvidia/Llama-3.1-8B-Instruct-FP4=mlx-community/Meta-Llama-3.1-8B-Instruct-4bit"
            )
        found[theirs.strip()] = ours.strip()
    return found
