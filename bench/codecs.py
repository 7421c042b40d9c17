"""What the codecs for slow links cost and give: rates, bytes, quality, and where each one wins.

Rates are of raw KV by the processor's time, with one thread and a whole piece of 8 MiB: quantising
as a vLLM worker does, and decoding as the receiver's thread of a connection does; MLX's own kernels
stand beside them.
Quality is that of MLX alone: it prefills the first half of a text, its cache is rounded to bfloat16
and sent through the codec, and it reads the second half, with the probabilities of every token at
each position against those with the cache that is only rounded. A hand-off decodes from the same
numbers (``tests/e2e/test_codecs.py``). The links are the cost model's, of the published set-up.

    python -m bench.codecs rates       # GB/s of one core
    python -m bench.codecs quality     # SmolLM2-135M-Instruct and Gemma-3-270M
    python -m bench.codecs links       # from the rates in the results
    python -m bench.codecs gpu         # quantising on an NVIDIA GPU, and its bytes beside a CPU's
    python -m bench.codecs rates --again

Each adds its rows to bench/results/codecs.json; ``--again`` those of a second process.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from bench.lab import RESULTS, record, save
from mlx_receiver.planning.cost import Codec, Link, Pair, Strategy, Work
from mlx_receiver.wire.layout import full_attention
from mlx_receiver.wire.profile import Decode, Prefill, Profile
from mlx_receiver.wire.quantised import ratio, row_bytes
from vllm_mac_decode.worker.quantise import quantise

CODECS: Final = ("q8", "q4")

#: Heads, tokens and width of a piece, of K or V: 8 MiB in 16 bits.
PIECE: Final = (8, 4096, 128)
REPEATS: Final = 20

#: Gbit/s.
LINKS: Final = (10.0, 5.0, 2.5, 1.0, 0.5, 0.1)


def timed(
    work: Callable[[], None], clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Seconds of one call: the least, and the median."""
    work()
    found = []
    for _ in range(REPEATS):
        began = clock()
        work()
        found.append(clock() - began)
    return {"best": min(found), "median": statistics.median(found)}


def rate(
    work: Callable[[], None], nbytes: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """The same as GB/s."""
    return {name: round(nbytes / 1e9 / taken, 3) for name, taken in timed(work, clock).items()}


# --- rates --------------------------------------------------------------------------------------


def rates() -> Iterator[dict[str, Any]]:
    """One row for each dtype and codec."""
    import mlx.core as mx

    from mlx_receiver.caches.quantised import decoded
    from mlx_receiver.transports.landing import scatter
    from mlx_receiver.wire.frames import Header, Kind

    torch.set_num_threads(1)
    heads, tokens, width = PIECE
    numbers = torch.randn(PIECE, generator=torch.Generator().manual_seed(1))
    for dtype in ("bfloat16", "float16", "float32"):
        rows = numbers.to(getattr(torch, dtype))
        raw = memoryview(bytearray(rows.nbytes))
        array = mx.array(numbers.numpy()).astype(getattr(mx, dtype))
        for codec in CODECS:
            bits = int(codec[1:])
            out = torch.empty(heads * tokens * row_bytes(codec, dtype, width), dtype=torch.uint8)
            quantise(rows, codec, out)
            header = Header(
                Kind.BLOCK, 1, len(out), dtype=dtype, heads=heads, tokens=tokens, width=width,
                codec=codec,
            )  # fmt: skip
            payload = memoryview(out.numpy())
            parts = mx.quantize(array, group_size=64, bits=bits, stream=mx.cpu)
            mx.eval(array, parts)
            yield {
                "dtype": dtype,
                "codec": codec,
                "bytes_of_raw": round(len(out) / rows.nbytes, 4),
                "encode": rate(lambda: quantise(rows, codec, out), rows.nbytes),  # noqa: B023
                "decode": rate(
                    lambda: scatter(decoded(header, payload), [raw]),  # noqa: B023
                    rows.nbytes,
                ),
                "mlx_quantize": rate(
                    lambda: mx.eval(mx.quantize(array, group_size=64, bits=bits, stream=mx.cpu)),  # noqa: B023
                    rows.nbytes,
                ),
                "mlx_dequantize": rate(
                    lambda: mx.eval(
                        mx.dequantize(*parts, group_size=64, bits=bits, stream=mx.cpu)  # noqa: B023
                    ),
                    rows.nbytes,
                ),
            }


# --- a GPU --------------------------------------------------------------------------------------


def hard(count: int) -> torch.Tensor:
    """Rows of every size, sign and kind that a cache may have, infinite ones left out."""
    source = np.random.default_rng(5)
    bits = source.integers(0, 2**32, (count, 64), dtype=np.uint32).view(np.float32)
    normal = source.standard_normal((count, 64)).astype(np.float32)
    rows = [
        np.where(np.isfinite(bits), bits, 0),
        normal * np.float32(10) ** source.integers(-40, 38, (count, 1)),
        np.repeat(normal[:, :1], 64, axis=1),
        np.zeros_like(normal),
        1000 + normal,
        source.integers(-128, 128, normal.shape).astype(np.float32) / 2,
    ]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def gpu() -> Iterator[dict[str, Any]]:
    """GB/s on a GPU, and whether the bytes are those that a CPU makes."""
    heads, tokens, width = PIECE
    for dtype in ("bfloat16", "float16", "float32"):
        kind = getattr(torch, dtype)
        numbers = torch.randn(PIECE, device="cuda").to(kind)
        rows = hard(20_000).to(kind)
        rows = torch.where(torch.isfinite(rows), rows, torch.zeros_like(rows))
        for codec in CODECS:
            size = rows.shape[0] * rows.shape[1] * row_bytes(codec, dtype, 64)
            made = [torch.empty(size, dtype=torch.uint8, device=d) for d in ("cpu", "cuda")]
            for out in made:
                quantise(rows.to(out.device), codec, out)
            size = heads * tokens * row_bytes(codec, dtype, width)
            out = torch.empty(size, dtype=torch.uint8, device="cuda")

            def run(out: torch.Tensor = out, numbers: torch.Tensor = numbers) -> None:
                quantise(numbers, codec, out)  # noqa: B023
                torch.cuda.synchronize()

            clock = time.perf_counter
            launch = timed(lambda: quantise(numbers, codec, out), clock)["median"]  # noqa: B023
            torch.cuda.synchronize()
            yield {
                "gpu": torch.cuda.get_device_name(),
                "dtype": dtype,
                "codec": codec,
                "encode": rate(run, numbers.nbytes, clock),
                "launch_us": round(1e6 * launch, 1),
                "bytes_that_differ": int((made[0] != made[1].cpu()).sum()),
                "bytes_compared": len(made[0]),
            }


# --- quality ------------------------------------------------------------------------------------


def quality() -> Iterator[dict[str, Any]]:
    """One row for each model and codec."""
    from mlx_receiver.decode.blas import use_fast_blas

    use_fast_blas()  # before MLX is imported
    from mlx_lm.utils import load_tokenizer

    from bench.gemma import fetch_gemma
    from bench.quality import BEGINS
    from vllm_mac_decode.tools.demo.model import fetch_smollm2
    from vllm_mac_decode.tools.quality.texts import SHIPPED

    for name, fetch in (("smollm2", fetch_smollm2), ("gemma", fetch_gemma)):
        folder = fetch()
        tokenizer = load_tokenizer(folder)
        passages = [tokenizer.encode(BEGINS.get(name, "") + text) for text in SHIPPED.values()]
        logs = _logs(folder, passages)
        right = np.concatenate([passage[len(passage) // 2 + 1 :] for passage in passages])
        for codec in CODECS:
            yield {"of": name} | _apart(logs["raw"], logs[codec], right, codec)


def _logs(folder: Path, passages: list[list[int]]) -> dict[str, np.ndarray]:
    """By codec ``[positions, vocabulary]``: log-probabilities in the passages' second halves."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)

    def through(array: mx.array, codec: str) -> mx.array:
        sent = array.astype(mx.bfloat16)
        if codec != "raw":
            parts = mx.quantize(sent, group_size=64, bits=int(codec[1:]))
            sent = mx.dequantize(*parts, group_size=64, bits=int(codec[1:]))
        return sent.astype(mx.float32)

    found: dict[str, list[np.ndarray]] = {codec: [] for codec in ("raw", *CODECS)}
    for tokens in passages:
        middle = len(tokens) // 2
        prefilled = make_prompt_cache(model)
        # No logits for these.
        mx.eval(model.model(mx.array([tokens[:middle]]), cache=prefilled))
        for codec, rows in found.items():
            caches = [copy.copy(cache) for cache in prefilled]
            for cache in caches:
                cache.keys, cache.values = (
                    through(array, codec) for array in (cache.keys, cache.values)
                )
            logits = model(mx.array([tokens[middle:-1]]), cache=caches)[0]
            rows.append(np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))
    return {codec: np.concatenate(rows) for codec, rows in found.items()}


def _apart(raw: np.ndarray, sent: np.ndarray, right: np.ndarray, codec: str) -> dict[str, Any]:
    raw, sent = raw.astype(np.float64), sent.astype(np.float64)
    nats = (np.exp(raw) * (raw - sent)).sum(-1)
    places = np.arange(len(right))
    over = raw[places, right] - sent[places, right]
    count = len(right) ** 0.5
    return {
        "codec": codec,
        "positions": len(right),
        "mean_kl": float(nats.mean()),
        "kl_error": float(nats.std(ddof=1) / count),
        "worst_kl": float(nats.max()),
        "same_top_token": float((raw.argmax(-1) == sent.argmax(-1)).mean()),
        "perplexity_raw": float(np.exp(-raw[places, right].mean())),
        "perplexity": float(np.exp(-sent[places, right].mean())),
        "over_nats": float(over.mean()),
        "over_error": float(over.std(ddof=1) / count),
    }


# --- links --------------------------------------------------------------------------------------


def links(known: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Totals of the published request by link and codec, and below which link each codec wins."""
    layout = full_attention(32, 8, 128, "bfloat16")  # Llama-3.1-8B
    measured = {row["codec"]: row for row in known["rates"] if row["dtype"] == "bfloat16"}
    on_gpu = {row["codec"]: row for row in known["gpu"] if row["dtype"] == "bfloat16"}
    codecs = [Codec()]
    for codec in CODECS:
        encode = on_gpu.get(codec, measured[codec])["encode"]["median"]
        decode = measured[codec]["decode"]["median"]
        codecs.append(Codec(codec, ratio(layout, codec), encode * 1e9, decode * 1e9))

    def total(gbit: float, codec: Codec) -> float:
        pair = Pair(SPARK, MAC, Link(gbit / 8 * 1e9, 2e-4), 32, lambda a, b: (b - a) * KV_BYTES)
        return pair.predict(Strategy.SPLIT, Work(8192, 32), codec=codec).total

    grid = np.geomspace(0.01, 100, 4001)
    for codec, before in zip(codecs, [codecs[0], *codecs[:-1]], strict=True):
        # Each against the one that loses less.
        wins = [g for g in grid if total(g, codec) < 0.99 * total(g, before)]
        yield {
            "codec": codec.name,
            "encode_gb_per_s": codec.encode / 1e9 if codec.name != "raw" else None,
            "decode_gb_per_s": codec.decode / 1e9 if codec.name != "raw" else None,
            "ratio": codec.ratio,
            "total_s": {f"{gbit:g}": round(total(gbit, codec), 3) for gbit in LINKS},
            "wins_below_gbit": round(float(max(wins)), 2) if wins else None,
            "than": before.name,
        }


#: Llama-3.1-8B in bf16.
KV_BYTES: Final = 131_072

#: The published set-up: 8,192 tokens in 1.47 s, 32 more in 0.85 s.
SPARK: Final = Profile(
    "DGX Spark",
    "Llama-3.1-8B",
    Prefill(0, 1.47 / 8192, 0, 8192),
    Decode(2.87 / 31, 0, 0),
    "hardware",
)
MAC: Final = Profile(
    "M3 Ultra",
    "Llama-3.1-8B",
    Prefill(0, 5.57 / 8192, 0, 8192),
    Decode(0.85 / 31, 0, 0),
    "hardware",
)


def main() -> None:
    """Measure and add."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rates", "quality", "gpu", "links"))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "codecs.json")
    options = parser.parse_args()
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    result = record("KV quantised on the wire: rates, bytes, quality, and the links it is for")
    known = {name: before.get(name, []) for name in ("rates", "gpu", "quality", "links")}
    number = 2 if options.again else 1
    rows: list[dict[str, Any]] = []
    if options.what == "links":
        result["links"] = list(links(known))
        known["links"] = result["links"]
    else:
        made = {"rates": rates, "quality": quality, "gpu": gpu}[options.what]
        for row in made():
            rows.append({"run": number} | row)
            print(json.dumps(rows[-1]), flush=True)
        known[options.what] = [r for r in known[options.what] if r["run"] != number] + rows
    save(result | known, options.out)


if __name__ == "__main__":
    main()
