"""The tests that belong to the installed vLLM, out of its source distribution."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import platformdirs

#: The name that every server gives its model, and the folder that tokenizers find it in.
MODEL_NAME = "upstream-model"

#: The models that the picked tests name; each becomes MODEL_NAME, which is all that is edited.
MODELS = (
    "HuggingFaceH4/zephyr-7b-beta",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolVLM-256M-Instruct",
    "Qwen/Qwen2-1.5B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "Qwen/Qwen3-8B",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "claude-3-7-sonnet-latest",
    "facebook/opt-125m",
    "openai-community/gpt2",
)
_MODEL = re.compile(f"""(["'])(?:{"|".join(map(re.escape, MODELS))})\\1""")


class SourceUnavailable(RuntimeError):
    """The source distribution could not be fetched; the text says why."""


def installed_version() -> str:
    """vLLM's release, without the local part of a CPU build."""
    return importlib.metadata.version("vllm").partition("+")[0]


def fetch(version: str) -> Path:
    """The source distribution of that release, from the user's cache or from the package index.

    pip builds an sdist's metadata before it keeps the file; that needs the build requirements in
    the extra "upstream", and a build for no device. Raises SourceUnavailable.
    """
    cache = platformdirs.user_cache_path("vllm-mac-decode") / "downloads"
    archive = cache / f"vllm-{version}.tar.gz"
    if archive.is_file():
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        pip = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation"),
                *("--no-binary", ":all:", "--quiet", "--disable-pip-version-check", "--no-input"),
                *("--dest", scratch, f"vllm=={version}"),
            ],
            env=os.environ | {"VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": version},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        found = Path(scratch) / archive.name
        if pip.returncode or not found.is_file():
            raise SourceUnavailable(f"pip could not download vllm {version}:\n{pip.stderr[-2000:]}")
        found.rename(archive)
    return archive


def unpack(archive: Path, folder: Path) -> None:
    """Put vLLM's tests and its pytest settings into `folder`, with the models' names replaced.

    vLLM's package itself is left out: it would hide the installed one.
    """
    with tarfile.open(archive) as bundle:
        members = []
        for member in bundle:
            inside = member.name.partition("/")[2]
            if inside == "pyproject.toml" or inside.startswith("tests/"):
                member.name = inside
                members.append(member)
        bundle.extractall(folder, members, filter="data")
    for path in (folder / "tests").rglob("*.py"):
        text = path.read_text()
        adapted = adapt(text)
        if adapted != text:
            path.write_text(adapted)


def adapt(text: str) -> str:
    """A test file's text with each string that is just a model's name replaced.

    Longer names stay, and names inside of other strings.
    """
    return _MODEL.sub(rf"\g<1>{MODEL_NAME}\g<1>", text)


def place_model(folder: Path, model: Path) -> None:
    """Let MODEL_NAME be a folder below `folder`, so that tokenizers load it by that name."""
    folder.mkdir(exist_ok=True)
    link = folder / MODEL_NAME
    link.unlink(missing_ok=True)
    link.symlink_to(model)


def plugin_folder() -> Path:
    """Where the plugin is that runs inside the tests' process."""
    return Path(__file__).with_name("inside")


def add_own_tests(folder: Path) -> None:
    """Copy what stands in for scripts of vLLM's that are no tests."""
    shutil.copy(plugin_folder() / "disagg_accuracy.py", folder / "tests")
