"""Models from the Hugging Face hub: first what describes one, its weights once ports are bound."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

#: Everything but the weights; the README says which model a quantised one was made from.
_DESCRIPTION: Final = ("*.json", "*.jinja", "*.model", "README.md")
_WEIGHTS: Final = "*.safetensors"

#: A hub's folder in its cache: models--<owner>--<name>/snapshots/<commit>.
_SNAPSHOT: Final = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?$")

#: Copies that need no login of models that do, by the model's own name.
_UNGATED: Final = {
    "Llama-3.1-8B-Instruct": "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit",
    "Llama-3.2-1B-Instruct": "mlx-community/Llama-3.2-1B-Instruct-4bit",
    "Llama-3.2-3B-Instruct": "mlx-community/Llama-3.2-3B-Instruct-4bit",
    "Llama-3.3-70B-Instruct": "mlx-community/Llama-3.3-70B-Instruct-4bit",
}

Progress = Callable[[str, int, int], None]


class HubError(Exception):
    """The hub does not give the model; the text says why and what to do."""


def description(name: str) -> Path:
    """The folder of a hub's model with everything but its weights. Raises HubError."""
    return _snapshot(name, None, _DESCRIPTION)


def weights(folder: Path, progress: Progress | None = None) -> None:
    """Fetch the weights that belong into a folder of the hub's cache; any other is left alone.

    ``progress`` counts bytes. Raises HubError.
    """
    place = _SNAPSHOT.search(str(folder))
    if place is not None:
        owner, name, commit = place.groups()
        _snapshot(f"{owner}/{name}", commit, (*_DESCRIPTION, _WEIGHTS), progress)


def name_of(folder: Path) -> str | None:
    """``owner/name`` of a folder of the hub's cache, None for any other."""
    place = _SNAPSHOT.search(str(folder))
    return f"{place[1]}/{place[2]}" if place is not None else None


def base_model(folder: Path) -> str | None:
    """The model that the README of a converted one names as its base."""
    try:
        text = (folder / "README.md").read_text(errors="replace")
    except OSError:
        return None
    head = re.match(r"---\n(.*?)\n---", text, re.S)
    found = re.search(
        r"^base_model:\s*(?:\n\s*-\s*)?([\w.-]+/[\w.-]+)\s*$", head[1] if head else "", re.M
    )
    return found[1] if found else None


def _snapshot(
    name: str, revision: str | None, patterns: tuple[str, ...], progress: Progress | None = None
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(patterns),
                tqdm_class=_bar(progress),
            )
        )
    except Exception as error:
        raise HubError(_explained(name, error)) from error


def _explained(name: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        copy = _UNGATED.get(name.rpartition("/")[2])
        other = (
            f"--model {copy}" if copy else "look for one at https://huggingface.co/mlx-community"
        )
        return (
            f"{name} is only for those who have accepted its licence: accept it at "
            f"https://huggingface.co/{name}, then log in with: hf auth login. Or take a copy that "
            f"needs no login ({other})"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{name} is neither a folder here nor a model at https://huggingface.co/{name}. Check "
            "its spelling; if it is private, log in with: hf auth login"
        )
    said = " ".join(str(error).split())
    return (
        f"{name} is neither a folder nor a model that could be downloaded "
        f"({type(error).__name__}: {said})"
    )


def _bar(progress: Progress | None) -> type[Any]:
    """A ``tqdm`` that draws nothing, and tells ``progress`` about bytes on the disk."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            # Of the hub's bars only that of the bytes on the disk: not files, not the network's.
            self._counts = options.get("unit") == "B" and options.get("desc") != "Downloading bytes"
            super().__init__(*args, **options)

        def display(self, *_: object, **__: object) -> bool:  # type: ignore[override]
            if progress is not None and self._counts and self.total:
                progress("Fetching", int(self.n), int(self.total))
            return True

        def clear(self, *_: object, **__: object) -> None:
            pass

        def close(self) -> None:
            self.disable = True

    return Bar
