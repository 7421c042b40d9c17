"""What ``mac-decode check --quality`` says of real models in several precisions on the Mac's side.

vLLM serves the model in bfloat16. Each receiver has it as ``mlx_lm.convert`` quantises it (groups
of 64), or unquantised. All MLX arithmetic is in float32, since on a CPU that is the fast one: the
quantised weights are written out as the float32 numbers that they stand for, which are those that
MLX's quantised product multiplies with. The proof is left out: it would take those copies for
other weights (``bench.proof`` has what it says of quantised ones). Nothing here depends on how fast
the machine is.

    python -m bench.quality smollm2            # SmolLM2-135M-Instruct
    python -m bench.quality gemma              # Gemma-3-270M, 230 MB of packages
    python -m bench.quality smollm2 --again    # a second run, in new processes, beside the first
    python -m bench.quality smollm2 --bits 16 --kv fp8_e4m3   # vLLM's cache in 8-bit floats
    python -m bench.quality smollm2 --least --bits 8 4   # what 20 tokens show of the whole

Each adds its rows to bench/results/quality.json; ``python -m bench.model_table --write`` makes
docs/models.md's table of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import convert
from mlx_lm.utils import dequantize_model, load_model, load_tokenizer

from bench.gemma import fetch_gemma
from bench.lab import RESULTS, record, save
from tests.conftest import free_port
from tests.servers import Vllm, start_receiver, start_vllm
from vllm_mac_decode.tools.demo.model import fetch_smollm2
from vllm_mac_decode.tools.quality.figures import TOP, Row, divergence
from vllm_mac_decode.tools.quality.measure import Options, measure
from vllm_mac_decode.tools.quality.texts import SHIPPED

MODELS = {"smollm2": fetch_smollm2, "gemma": fetch_gemma}
#: What its texts begin with where the tokenizer does not say so: Gemma's, which comes from GGUF,
#: and a Gemma without it writes nonsense.
BEGINS = {"gemma": "<bos>"}
#: Bits of the Mac's weights; 16: those that vLLM has.
BITS = (16, 8, 4)


def written(model: Path, bits: int, folder: Path) -> Path:
    """The model with weights of so many bits, as float32 numbers."""
    if bits == 16:
        return model
    quantised = folder.with_name(f"{folder.name}-quantised")
    convert(str(model), mlx_path=str(quantised), quantize=True, q_bits=bits)
    made, config = load_model(quantised)
    made.set_dtype(mx.float32)
    dequantize_model(made)
    weights = dict(tree_flatten(made.parameters()))
    mx.eval(weights)
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    for name in ("quantization", "quantization_config"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for file in quantised.iterdir():
        if not (".safetensors" in file.name or (folder / file.name).exists()):
            shutil.copy(file, folder)
    shutil.rmtree(quantised)
    return folder


def row(
    vllm: Vllm, model: Path, bits: int, port: int, scratch: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """One receiver, in the place of the one before."""
    folder = written(model, bits, scratch / f"{model.name}-{bits}bit")
    log = scratch / f"receiver-{bits}.log"
    receiver = start_receiver(folder, log, port=port, args=("--kv-memory", "256MiB"))
    try:
        vllm.wait_connected(receiver, 60)
        found = measure(
            Options(
                vllm.url,
                receiver.url,
                texts={n: BEGINS.get(options.model, "") + text for n, text in SHIPPED.items()},
                positions=options.positions,
                responses=options.responses,
                seconds=options.seconds,
            ),
            lambda what, done: None,
        )
    finally:
        receiver.server.stop()
    return {"bits": bits, "kv": options.kv} | json.loads(msgspec.json.encode(found))


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each precision, with a vLLM of its own."""
    model, port = MODELS[options.model](), free_port()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        vllm = start_vllm(
            model,
            scratch / "vllm.log",
            receiver=f"127.0.0.1:{port}",
            args=("--dtype", "bfloat16", "--kv-cache-dtype", options.kv),
            env={"MAC_DECODE_PROOF": "false"},
        )
        rows = []
        try:
            for bits in options.bits:
                rows.append(row(vllm, model, bits, port, scratch, options))
                print(json.dumps(rows[-1]), flush=True)
        finally:
            vllm.server.stop()
    return rows


def least(model: Path, bits: int, scratch: Path) -> dict[str, Any]:
    """How much of the whole divergence the 20 likeliest tokens show: of MLX alone with vLLM's
    weights to MLX with others, where every token's probability is known."""
    tokenizer = load_tokenizer(model)
    texts = [tokenizer.encode(text) for text in SHIPPED.values()]
    p, q = (
        _logs(folder, texts)
        for folder in (model, written(model, bits, scratch / f"least-{bits}bit"))
    )
    whole = (np.exp(p) * (p - q)).sum(-1)
    shown = [divergence(_top(a), _top(b)) for a, b in zip(p, q, strict=True)]
    return {
        "model": model.name,
        "bits": bits,
        "positions": len(shown),
        "mean_kl_whole": float(whole.mean()),
        "mean_kl_shown": float(np.mean(shown)),
        # float32 sums are right to about 1e-6.
        "shown_more_than_whole": int(sum(s > w + 1e-5 for s, w in zip(shown, whole, strict=True))),
    }


def _logs(folder: Path, texts: list[list[int]]) -> np.ndarray:
    """``[positions, vocabulary]``: log-probabilities behind each token of texts, but the first."""
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    found = []
    for tokens in texts:
        logits = model(mx.array([tokens]))[0, 11:-1]
        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        found.append(np.array(logs, np.float64))
    return np.concatenate(found)


def _top(logs: np.ndarray) -> Row:
    return {int(token): float(logs[token]) for token in np.argsort(-logs)[:TOP]}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["of"], row.get("kv", "auto"), -row["bits"], row["run"]


def main() -> None:
    """Measure and add."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--least", action="store_true")
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--kv", default="auto", help="vLLM's --kv-cache-dtype")
    parser.add_argument("--positions", type=int, default=80)
    parser.add_argument("--responses", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    options = parser.parse_args()
    result = record("a hand-off's next-token distributions against each engine alone")
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    result |= {"rows": before.get("rows", []), "least": before.get("least", [])}
    if options.least:
        model = MODELS[options.model]()
        with tempfile.TemporaryDirectory() as scratch:
            result["least"] = [least(model, bits, Path(scratch)) for bits in options.bits]
    else:
        number = 2 if options.again else 1
        rows = [{"of": options.model, "run": number} | found for found in run(options)]
        new = set(map(_key, rows))
        rows += [r for r in result["rows"] if _key(r) not in new]
        result["rows"] = sorted(rows, key=_key)
    save(result, options.out)


if __name__ == "__main__":
    main()
