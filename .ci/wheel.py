"""Build the source archive and the wheel into dist/, and try the wheel in a bare environment.

`make wheel` runs it. The environment holds the wheel and what it requires: neither engine.
"""

import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"

TRY = """
from importlib.metadata import entry_points
import mlx_receiver.transports.tcp, mlx_receiver.transports.zmq
assert {p.name for p in entry_points(group="mac_decode")} >= {"tcp", "mlx"}
assert [p.load() for p in entry_points(group="vllm.general_plugins", name="mac_decode")]
"""


def run(*command: str | Path) -> None:
    """Run a command; ends the program with its status when it fails."""
    print("$", *command, flush=True)
    done = subprocess.run([str(part) for part in command], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Build, check the metadata, install, and start both commands."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    archives = sorted(DIST.iterdir())
    run(sys.executable, "-m", "twine", "check", "--strict", *archives)
    (wheel,) = DIST.glob("*.whl")
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        scripts = Path(folder) / "bin"
        run(scripts / "python", "-m", "pip", "install", "--quiet", wheel)
        run(scripts / "python", "-c", TRY)
        for command in ("mlx-receiver", "mac-decode"):
            run(scripts / command, "--version")
            run(scripts / command, "--help")
    print(*(f"{archive.relative_to(ROOT)}" for archive in archives), sep="\n")


if __name__ == "__main__":
    main()
