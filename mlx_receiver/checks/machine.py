"""What the system says: each check reads one command's output, or asks the kernel."""

from __future__ import annotations

import platform
import re
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Final

from mlx_receiver.checks.finding import Finding, unchecked
from mlx_receiver.interfaces import Interface, run
from mlx_receiver.wire.addresses import listening

#: The first macOS that MLX has wheels for, and the first Python.
_MACOS: Final = (14,)
_PYTHON: Final = (3, 11)

#: MLX and mlx-lm belong together: from the first of these releases, to before the second.
_RELEASES: Final = ((0, 32), (0, 34))

_FIREWALL: Final = "/usr/libexec/ApplicationFirewall/socketfilterfw"

#: Open files that a receiver with a few clients needs.
_FILES: Final = 1024

#: Mbit/s below which a link is the bottleneck: one made of copper and for 10 Gbit/s is not.
_FAST: Final = 10_000

#: A command's output, None where there is none.
Run = Callable[..., str | None]


def machine_checks(
    ports: Sequence[tuple[str, int]], found: Sequence[Interface]
) -> Iterator[Finding]:
    """All of them; ``ports`` are options and numbers, ``found`` this machine's interfaces."""
    darwin = sys.platform == "darwin"
    yield check_architecture(sys.platform, platform.machine(), run)
    yield check_macos(platform.mac_ver()[0]) if darwin else unchecked("macOS", "this is no Mac")
    yield check_python(sys.version_info[:3])
    yield check_packages(_installed, darwin)
    for option, port in ports:
        yield check_port(option, port)
    yield check_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    if darwin:
        yield check_firewall(run(_FIREWALL, "--getglobalstate"), sys.executable)
        yield check_sleep(run("/usr/bin/pmset", "-g"))
    else:
        yield unchecked("firewall", "only macOS's own can be asked")
        yield unchecked("sleep", "this is no Mac")
    yield check_interfaces(found)


def check_architecture(system: str, machine: str, run: Run) -> Finding:
    """Apple silicon, and a Python that is not translated from Intel's."""
    name = "architecture"
    if system != "darwin":
        return unchecked(name, f"{system} on {machine}, no Mac; MLX runs on what there is")
    if (run("/usr/sbin/sysctl", "-n", "sysctl.proc_translated") or "").strip() == "1":
        return Finding(
            name, "wrong", "this Python is for Intel, translated by Rosetta: MLX needs arm64",
            "Make the environment anew with a Python for arm64, e.g. with uv or Homebrew in "
            "/opt/homebrew, from a terminal that is not opened with Rosetta",
        )  # fmt: skip
    if machine != "arm64":
        return Finding(
            name, "wrong", f"this Mac has a processor of {machine}", "MLX needs Apple silicon"
        )
    return Finding(name, "fine", "Apple silicon, arm64")


def check_macos(version: str) -> Finding:
    """One that MLX has wheels for."""
    if _numbers(version) >= _MACOS:
        return Finding("macOS", "fine", version)
    return Finding(
        "macOS", "wrong", f"{version or 'unknown'} is too old for MLX", f"Update to {_MACOS[0]}"
    )


def check_python(version: tuple[int, ...]) -> Finding:
    """One that this package runs with."""
    text = ".".join(map(str, version))
    if version >= _PYTHON:
        return Finding("Python", "fine", text)
    return Finding(
        "Python", "wrong", f"{text} is too old",
        "Make the environment with Python 3.11 or newer: macOS's own is not, uv's or Homebrew's is",
    )  # fmt: skip


def check_packages(version_of: Callable[[str], str | None], darwin: bool) -> Finding:
    """MLX, mlx-lm and MLX's Metal library, in releases that belong together."""
    name = "packages"
    mlx, lm, metal = (version_of(package) for package in ("mlx", "mlx-lm", "mlx-metal"))
    lowest, beyond = (".".join(map(str, release)) for release in _RELEASES)
    remedy = f"pip install 'mlx>={lowest},<{beyond}' 'mlx-lm>={lowest},<{beyond}'"
    seen = f"mlx {mlx or 'is missing'}, mlx-lm {lm or 'is missing'}"
    if darwin:
        seen += f", mlx-metal {metal or 'is missing'}"
    for version in (mlx, lm):
        if version is None or _numbers(version)[:2] < _RELEASES[0]:
            why = "" if version is None else f": {lowest} is the first that is safe across threads"
            return Finding(name, "wrong", seen + why, remedy)
    if darwin and metal != mlx:
        return Finding(name, "wrong", f"{seen}: it must be mlx's own", f"{remedy} mlx-metal=={mlx}")
    if any(_numbers(version or "")[:2] >= _RELEASES[1] for version in (mlx, lm)):
        return Finding(name, "warning", f"{seen}: newer than what this version knows", remedy)
    return Finding(name, "fine", seen)


def check_port(option: str, port: int) -> Finding:
    """It is free, on all of this machine's addresses."""
    name = option.removeprefix("--")
    if not port:
        return Finding(name, "fine", "any free one")
    try:
        for server in listening("::", port):
            server.close()
    except OSError as error:
        return Finding(
            name, "wrong", f"{port} cannot be used ({error.strerror or error})",
            f"See who has it with: lsof -nP -iTCP:{port} -sTCP:LISTEN (a receiver that runs "
            f"already?), or choose another with {option}",
        )  # fmt: skip
    return Finding(name, "fine", f"{port} is free")


def check_files(soft: int, hard: int) -> Finding:
    """``start`` raises the soft limit of open files as far as the hard one allows."""
    most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    seen = f"{soft} allowed, {most} on request, which start makes"
    if hard != resource.RLIM_INFINITY and hard < _FILES:
        return Finding(
            "open files", "warning", f"{seen}; {_FILES} would be enough for many clients",
            f"ulimit -Hn {_FILES} before the start, or limits of the service that starts it",
        )  # fmt: skip
    return Finding("open files", "fine", seen)


def check_firewall(output: str | None, python: str) -> Finding:
    """What ``socketfilterfw --getglobalstate`` says: 0 is off, 1 asks, 2 blocks everything."""
    state = re.search(r"State = (\d)", output or "")
    if state is None:
        return unchecked("firewall", f"{_FIREWALL} says nothing of it")
    match state[1]:
        case "0":
            return Finding("firewall", "fine", "off")
        case "1":
            return Finding(
                "firewall", "warning", "on: it lets other machines in to programs that are allowed",
                "Allow Python when macOS asks at the first start, or: "
                f"sudo {_FIREWALL} --add {python} --unblockapp {python}",
            )  # fmt: skip
        case _:
            return Finding(
                "firewall", "wrong", "on, and it blocks all incoming connections",
                "System Settings > Network > Firewall > Options: switch 'Block all incoming "
                "connections' off",
            )  # fmt: skip


def check_sleep(output: str | None) -> Finding:
    """What ``pmset -g`` says of idle sleep and of the low power mode."""
    settings = dict(re.findall(r"^\s*(\w+)\s+(\d+)\b", output or "", re.M))
    if "sleep" not in settings:
        return unchecked("sleep", "pmset says nothing of it")
    minutes = int(settings["sleep"])
    seen = "never when idle" if not minutes else f"after {minutes} idle minutes, but not while "
    seen += "" if not minutes else "mlx-receiver runs (caffeinate)"
    if settings.get("lowpowermode") == "1" or settings.get("powermode") == "1":
        return Finding(
            "sleep", "warning", f"{seen}; low power mode is on, which slows decoding",
            "sudo pmset -a lowpowermode 0",
        )  # fmt: skip
    return Finding("sleep", "fine", seen)


def check_interfaces(found: Sequence[Interface]) -> Finding:
    """There is a fast one; they are ordered."""
    name = "interfaces"
    real = [interface for interface in found if interface.kind != "virtual"]
    seen = "; ".join(f"{'/'.join(i.addresses)} ({i.text})" for i in found)
    if not found:
        return Finding(name, "wrong", "none is up", "Connect this machine to the other one")
    if not real:
        return Finding(
            name, "warning", f"{seen}: none of them is hardware", "Is this a container, or a VPN?"
        )
    best = real[0]
    if best.kind == "wifi":
        return Finding(
            name, "warning", f"{seen}: only Wi-Fi, 10 to 50 times slower than a 10 Gbit/s cable",
            "Connect the machines by a cable, and use the address that it has here",
        )  # fmt: skip
    if best.mbits and best.mbits < _FAST:
        return Finding(
            name, "warning", f"{seen}: {best.name} is a bottleneck for long prompts",
            "Use a 10 Gbit/s port and cable on both machines",
        )  # fmt: skip
    return Finding(name, "fine", seen)


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
