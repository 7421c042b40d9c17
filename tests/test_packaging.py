"""What the distribution installs, registers and imports."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTION = "vllm-mac-decode"
FOLDERS = {
    "entrypoints": "mac_decode_entrypoints",
    "mlx_receiver": "mlx_receiver",
    "vllm_mac_decode": "vllm_mac_decode",
}
HEAVY = {"mlx", "mlx_lm", "torch", "transformers", "vllm"}

IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def python(folder: Path, *arguments: str) -> str:
    """What a fresh interpreter prints that sees the installed packages, not the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def top_level_modules_after_importing(package: str, folder: Path) -> set[str]:
    """What is loaded once every module of `package` is imported."""
    return set(python(folder, "-c", IMPORT_ALL, package).splitlines()[-1].split())


def imported_names(package: str) -> Iterator[tuple[Path, str]]:
    """Every module that the source of `package` imports, those inside functions included."""
    for source in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                yield from ((source, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield from ((source, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("vllm.general_plugins", {"mac_decode": "mac_decode_entrypoints.vllm_plugin:register"}),
        (
            "mac_decode",
            {
                "tcp": "mac_decode_entrypoints.builtin_wire",
                "mlx": "mac_decode_entrypoints.builtin_mlx",
            },
        ),
        (
            "console_scripts",
            {
                "mac-decode": "vllm_mac_decode.tools.cli:main",
                "mlx-receiver": "mlx_receiver.cli:main",
            },
        ),
    ],
)
def test_entry_points_are_registered_and_load(group: str, expected: dict[str, str]) -> None:
    found = importlib.metadata.distribution(DISTRIBUTION).entry_points.select(group=group)
    assert {point.name: point.value for point in found} == expected
    for point in found:
        point.load()


def test_the_name_entrypoints_is_left_to_pypi(tmp_path: Path) -> None:
    program = (
        "import importlib.util; print(importlib.util.find_spec('mac_decode_entrypoints').origin);"
        "spec = importlib.util.find_spec('entrypoints'); print(spec and spec.origin)"
    )
    ours, theirs = python(tmp_path, "-c", program).splitlines()
    assert ours.endswith("__init__.py")
    assert theirs != ours


def test_registration_imports_nothing_heavy(tmp_path: Path) -> None:
    assert not top_level_modules_after_importing("mac_decode_entrypoints", tmp_path) & HEAVY


def test_the_wire_imports_no_engine(tmp_path: Path) -> None:
    loaded = top_level_modules_after_importing("mlx_receiver.wire", tmp_path)
    assert not loaded & (HEAVY | {"vllm_mac_decode"})


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_vllm_half_runs_without_mlx(tmp_path: Path) -> None:
    loaded = top_level_modules_after_importing("vllm_mac_decode", tmp_path)
    assert not loaded & {"mlx", "mlx_lm"}


def test_the_receiver_never_imports_the_vllm_half() -> None:
    forbidden = {"torch", "vllm", "vllm_mac_decode"}
    assert [
        (source.name, name)
        for source, name in imported_names("mlx_receiver")
        if name.split(".")[0] in forbidden
    ] == []


def test_the_vllm_half_knows_only_the_wire_of_the_receiver() -> None:
    """And what both sides share: how they find each other and pair, how settings become options,
    what a request costs."""
    shared = ("wire", "transports", "plugins", "options", "settings", "discovery", "pairing",
              "planning")  # fmt: skip
    assert [
        (source.name, name)
        for source, name in imported_names("vllm_mac_decode")
        if name.split(".")[0] in {"mlx", "mlx_lm", "mlx_receiver"}
        and not f"{name}.".startswith(tuple(f"mlx_receiver.{name}." for name in shared))
    ] == []


def test_the_scheduler_half_runs_without_vllm(tmp_path: Path) -> None:
    loaded = top_level_modules_after_importing("vllm_mac_decode.scheduler", tmp_path)
    assert not loaded & HEAVY


def test_what_the_documents_say_is_tested_is_tested() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = set(re.findall(r"`([a-z0-9_/]+\.py)`", text))
    assert len(named) > 8
    tests = {name for name in named if "/test_" in name}
    assert not [name for name in tests if not (ROOT / "tests" / name).is_file()]


def test_the_wheel_holds_every_package_and_nothing_else(tmp_path: Path) -> None:
    # A copy: setuptools leaves its build folder behind and would pick up stale files from one.
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, checkout)
    python(
        tmp_path,
        *("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", str(tmp_path), str(checkout)),
    )

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {
        (Path(installed) / path.relative_to(ROOT / folder)).as_posix()
        for folder, installed in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == sources
    assert {"vllm_mac_decode/py.typed", "mlx_receiver/py.typed"} <= packed
