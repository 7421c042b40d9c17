"""What grammars cost: llguidance beside xgrammar, and in the receiver's batch.

    python -m bench.grammars

The tokenizer is trained here, on the sources of installed packages, to a vocabulary of 151,936, as
Qwen's; the model in the batch is a tiny random one with that vocabulary. Times are one thread's.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench.lab import RESULTS, record, save

VOCABULARY: Final = 151_936
#: Bytes of text that the tokenizer is trained on.
TEXT: Final = 80 << 20

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string"}},
            "required": ["street"],
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
WIDE = {
    "type": "object",
    "properties": {f"field_{i}": {"type": ["string", "null"]} for i in range(60)},
    "required": [f"field_{i}" for i in range(60)],
    "additionalProperties": False,
}
ADA = {"name": "Ada Lovelace", "age": 36, "tags": ["mathematics", "poetry, or so it is said"],
       "address": {"street": "12 St James's Square, London", "zip": "SW1Y 4JH"}}  # fmt: skip
CALC = 'root ::= term (("+" | "-") term)*\nterm ::= [0-9]+ | "(" root ")"\n'

#: kind -> what constrains, and a text that conforms.
CASES: Final[dict[str, tuple[str, Any, str]]] = {
    "JSON schema": ("json", PERSON, json.dumps(ADA)),
    "JSON schema, 60 properties": ("json", WIDE, json.dumps(
        {f"field_{i}": None if i % 3 else f"the value of {i}" for i in range(60)})),
    "JSON object": ("json", {"type": "object"}, json.dumps(ADA)),
    "regular expression": ("regex", r"([A-Z][a-z]+ ){2,8}[0-9]{4}-[0-9]{2}-[0-9]{2}",
                           "Received On Monday Morning 2026-11-29"),
    "1,000 choices": ("choice", [f"choice number {i}" for i in range(1000)], "choice number 777"),
    "EBNF": ("grammar", CALC, "12+(345-(6+7))-89+(10)"),
}  # fmt: skip


def texts() -> Iterator[str]:
    """Sources of the installed packages."""
    left = TEXT
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        text = path.read_text(errors="ignore")
        yield text
        left -= len(text)
        if left < 0:
            return


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of VOCABULARY tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [f"<|special_{i}|>" for i in range(3)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": specials[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and its result."""
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def summary(compile_s: float, steps: list[float]) -> dict[str, float]:
    """In milliseconds, and microseconds for the steps."""
    return {
        "compile_ms": round(1e3 * compile_s, 2),
        "step_us_p50": round(1e6 * median(steps), 1),
        "step_us_max": round(1e6 * max(steps), 1),
    }


def with_llguidance(folder: Path) -> dict[str, Any]:
    """As the receiver uses it: numpy, and a mask of booleans as the result."""
    import llguidance

    from mlx_receiver.decode.grammar.compiling import Compiled
    from mlx_receiver.decode.grammar.translation import translated
    from mlx_receiver.decode.grammar.trial import parser_limits
    from mlx_receiver.wire.sampling import Grammar

    text = (folder / "tokenizer.json").read_text()
    load_s, tokenizer = seconds(
        lambda: llguidance.LLTokenizer(text, n_vocab=VOCABULARY, eos_token=[2])
    )
    found: dict[str, Any] = {"version": llguidance.__version__, "tokenizer_s": round(load_s, 2)}
    for name, (kind, spec, sample) in CASES.items():
        source = spec if isinstance(spec, str) else json.dumps(spec)
        grammar = Grammar(kind, source)  # type: ignore[arg-type]

        def compiled(grammar: Grammar = grammar) -> Any:
            return llguidance.LLMatcher(tokenizer, translated(grammar), limits=parser_limits())

        compiled()
        compile_s, matcher = seconds(compiled)
        text_s: list[float] = []
        # The second text: the first fills the grammar's automaton.
        for _ in range(2):
            text_s.clear()
            row = Compiled(matcher, VOCABULARY, VOCABULARY).begin([2], None)
            for token in [*tokenizer.tokenize_str(sample), 2]:
                step, mask = seconds(row.allowed)
                assert mask is not None and mask[token], (name, sample, token)
                text_s.append(step + seconds(functools.partial(row.accept, token))[0])
            assert not row.fault
        found[name] = summary(compile_s, text_s)
    return found


def with_xgrammar(folder: Path) -> dict[str, Any]:
    """As vLLM uses it: torch, and a mask of bits as the result."""
    import torch
    import xgrammar as xgr
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    fast = AutoTokenizer.from_pretrained(folder)
    load_s, info = seconds(
        lambda: xgr.TokenizerInfo.from_huggingface(fast, vocab_size=VOCABULARY, stop_token_ids=[2])
    )
    found: dict[str, Any] = {"tokenizer_s": round(load_s, 2)}
    for name, (kind, spec, sample) in CASES.items():
        compiler = xgr.GrammarCompiler(info, max_threads=1, cache_enabled=False)

        def compiled(compiler: Any = compiler, kind: str = kind, spec: Any = spec) -> Any:
            if kind == "json":
                return compiler.compile_json_schema(json.dumps(spec))
            if kind == "regex":
                return compiler.compile_regex(spec)
            if kind == "choice":
                choices = " | ".join(json.dumps(choice) for choice in spec)
                return compiler.compile_grammar(f"root ::= {choices}")
            return compiler.compile_grammar(spec)

        compile_s, context = seconds(compiled)
        bits = xgr.allocate_token_bitmask(1, VOCABULARY)
        steps: list[float] = []
        for _ in range(2):
            steps.clear()
            matcher = xgr.GrammarMatcher(context)
            for token in [*fast.encode(sample), 2]:
                step, _ = seconds(functools.partial(matcher.fill_next_token_bitmask, bits))
                took, taken = seconds(functools.partial(matcher.accept_token, token))
                assert taken, (name, sample, token)
                steps.append(step + took)
        found[name] = summary(compile_s, steps)
    return found


def in_the_batch(folder: Path, rows: int, steps: int, rounds: int = 4) -> dict[str, Any]:
    """Milliseconds of a decode step of ``rows`` texts, some of them with a grammar: the tenth
    percentile of the least disturbed of ``rounds``."""
    from mlx_receiver.decode.engine import DecodeEngine
    from mlx_receiver.decode.local import LocalJob
    from mlx_receiver.decode.model import find_model
    from mlx_receiver.wire.sampling import Grammar, Sampling

    engine = DecodeEngine(find_model(str(folder)), dtype="float32", max_batch=rows)
    engine.start()
    engine.wait_loaded()
    # Long, so that no text ends.
    grammar = Grammar("json", json.dumps({"type": "string", "minLength": 5000}))
    found: dict[str, Any] = {"rows": rows, "steps": steps}
    try:
        engine.grammars.compile(grammar).result()
        for constrained in (0, 1, rows) * rounds:
            jobs = [
                LocalJob(
                    engine,
                    [5 + row] * 16,
                    Sampling(
                        max_tokens=steps,
                        temperature=0.0,
                        grammar=grammar if row < constrained else None,
                    ),
                )
                for row in range(rows)
            ]
            times = []
            for _ in range(steps):
                for job in jobs:
                    job.next(60)
                times.append(time.perf_counter())
            took = sorted(b - a for a, b in itertools.pairwise(times[8:]))
            # The undisturbed steps: others use the machine, too.
            name = f"{constrained} with a grammar: step_ms"
            found[name] = round(min(1e3 * took[len(took) // 10], found.get(name, 1e9)), 2)
    finally:
        engine.stop()
    return found


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS / "grammars.json")
    options = parser.parse_args()
    from mlx_receiver.decode.blas import use_fast_blas
    from tests.models import tiny_llama

    use_fast_blas()
    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny_llama(Path(scratch) / "model", vocab_size=VOCABULARY)
        train_s, _ = seconds(lambda: write_tokenizer(folder))
        print(f"trained a tokenizer in {train_s:.0f} s", file=sys.stderr)
        result = record("Grammars: compiling, a step, and a decode step of the batch") | {
            "vocabulary": VOCABULARY,
            "llguidance": with_llguidance(folder),
            "xgrammar": with_xgrammar(folder),
            "batch": in_the_batch(folder, options.rows, options.steps),
        }
    save(result, options.out)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
