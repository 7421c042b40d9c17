"""`mac-decode demo`: one request through both engines on this machine, drawn and checked.

The last line on stdout is one JSON object; its `ok` and the exit status say the same.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from mlx_receiver.wire.layout import CacheLayout, layout_from_config
from vllm_mac_decode.tools import timeline
from vllm_mac_decode.tools.demo.ask import Answer, ask, reference, warm_up
from vllm_mac_decode.tools.demo.model import fetch_smollm2
from vllm_mac_decode.tools.demo.pair import Pair, started
from vllm_mac_decode.tools.demo.prompt import DEFAULT_PROMPT
from vllm_mac_decode.tools.timeline import plot as timeline_plot
from vllm_mac_decode.tools.timeline import text as timeline_text

_MAX_MODEL_LEN = 4096
_NEEDED = ("vllm", "mlx", "mlx_lm", "openai", "matplotlib")


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    prompt: str = DEFAULT_PROMPT
    model: Path | None = None
    max_tokens: int = 64
    out: Path = Path("mac-decode-demo")


def run(options: Options) -> int:
    """Run the demo; the exit status. Whatever happens, both servers are stopped by then."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    result: dict[str, Any] = {"ok": False}
    status = 1
    try:
        with _stoppable():
            problems = _demo(options, console, result)
        if problems:
            result["error"] = "; ".join(problems)
        else:
            result["ok"] = True
            status = 0
    except KeyboardInterrupt:
        result["error"] = "interrupted"
        status = 130
    except Exception as error:
        result["error"] = str(error) or type(error).__name__
    if "error" in result:
        console.print(f"\n[bold red]The demo failed.[/] {escape(result['error'])}")
    sys.stdout.flush()
    print(json.dumps(result), flush=True)
    return status


def _demo(options: Options, console: Console, result: dict[str, Any]) -> list[str]:
    """Fill ``result``; returns what is wrong with it."""
    # Before minutes have gone by. No index has a package of our name to ask for.
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"the demo needs {', '.join(missing)}: `make demo` in the repository installs it all"
        )
    progress = Console(stderr=True, highlight=False)
    out = _output_folder(options.out)
    model = _model(options.model, progress)
    config = json.loads((model / "config.json").read_text())
    layout = layout_from_config(config, "float32")
    limit = min(_MAX_MODEL_LEN, int(config.get("max_position_embeddings") or _MAX_MODEL_LEN))
    result["model"] = model.name

    console.print(f"[bold]Starting both servers[/] with {model.name} in float32 (logs: {out})")
    with started(model, limit, out, progress) as pair:
        with progress.status("Warming up"):
            warm_up(pair)
        counted = _counters(pair)
        answer = _stream(pair, options, console)
        decoded, kv_bytes = (
            now - before for now, before in zip(_counters(pair), counted, strict=True)
        )
        recorded = pair.handoff(answer.id)
        result["prefill_engine"] = f"vllm {pair.vllm_version()}"
        # The receiver runs in this same environment.
        result["decode_engine"] = f"mlx {metadata.version('mlx')}"

    handoff = timeline.parse(recorded)
    gap = handoff.figures.handoff_gap_ms
    result |= {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "decoded_by_receiver": decoded,
        "kv_bytes": kv_bytes,
        "layers": len(handoff.layers),
        "handoff_gap_ms": None if gap is None else round(gap, 1),
    }
    _draw(handoff, recorded, out, console)
    console.print("[bold]Checking[/] against MLX's own prefill and decode of the same tokens")
    with progress.status("MLX alone (its prefill takes about a minute on a CPU)"):
        expected = reference(model, answer, out)
    equal = bool(expected) and expected == answer.token_ids
    result["parity"] = {
        "mode": "greedy-fp32",
        "tokens_compared": len(answer.token_ids),
        "equal": equal,
    }
    problems = _problems(answer, layout, result)
    if not problems:
        console.print(
            f"[green]✓[/] vLLM + hand-off and MLX alone gave the same {len(expected)} tokens; "
            f"{decoded} of them were decoded by the receiver."
        )
    return problems


def _problems(answer: Answer, layout: CacheLayout, result: dict[str, Any]) -> list[str]:
    """Everything that is not as it must be after a request was handed off, in words."""
    expected_bytes = layout.nbytes(answer.prompt_tokens)
    problems = []
    if answer.completion_tokens < 2:
        problems.append("the answer ended at its first token: nothing was left to hand off")
    if len(answer.prompt_token_ids) != answer.prompt_tokens:
        listed = len(answer.prompt_token_ids)
        problems.append(f"vLLM counts {answer.prompt_tokens} prompt tokens, but lists {listed}")
    if len(answer.token_ids) != answer.completion_tokens:
        problems.append(
            f"vLLM counts {answer.completion_tokens} tokens, but sent {len(answer.token_ids)}"
        )
    if result["decoded_by_receiver"] != answer.completion_tokens - 1:
        problems.append(
            f"the receiver decoded {result['decoded_by_receiver']} tokens, "
            f"not {answer.completion_tokens - 1}"
        )
    if result["kv_bytes"] != expected_bytes:
        problems.append(f"{result['kv_bytes']} bytes of KV arrived, not {expected_bytes}")
    if result["layers"] != len(layout.layers):
        problems.append(f"{result['layers']} layers arrived, not {len(layout.layers)}")
    if result["handoff_gap_ms"] is None:
        problems.append("the receiver recorded no first token of its own")
    if not result["parity"]["equal"]:
        problems.append("MLX alone gives other tokens: the handed-off cache is not MLX's own")
    return problems


def _stream(pair: Pair, options: Options, console: Console) -> Answer:
    """Send the request and show the answer as it arrives, vLLM's own token underlined."""
    first_line = options.prompt.strip().partition("\n")[0]
    console.print(f"\n[bold]Prompt[/] {escape(first_line)} …")
    console.print("[bold]Answer[/] ", end="")
    shown = 0

    def show(text: str) -> None:
        nonlocal shown
        console.out(text, end="", style="underline blue" if not shown else None)
        sys.stdout.flush()
        shown += 1

    try:
        answer = ask(pair, options.prompt, options.max_tokens, show)
    finally:
        console.print("\n")
    pair.check()
    if answer.arrivals:
        first, last = answer.arrivals[0], answer.arrivals[-1]
        console.print(
            f"{answer.prompt_tokens} prompt tokens, first token after {first:.2f} s (vLLM), "
            f"{answer.completion_tokens - 1} more in {last - first:.2f} s (MLX)\n"
        )
    return answer


def _draw(handoff: timeline.Handoff, recorded: bytes, out: Path, console: Console) -> None:
    console.print(f"[bold]{timeline_plot.headline(handoff)}[/]")
    console.print(timeline_plot.caption(handoff))
    console.print(timeline_text.render(handoff, console.width))
    (out / "handoff.json").write_bytes(recorded)
    trace = out / "trace.json"
    trace.write_text(json.dumps(timeline.trace_events(handoff)))
    picture = timeline_plot.draw(handoff, out / "handoff.png")
    timeline_plot.draw(handoff, out / "handoff.svg")
    console.print(f"\nPicture: {picture}   Trace for https://ui.perfetto.dev: {trace}\n")


def _counters(pair: Pair) -> tuple[int, int]:
    return (
        pair.receiver_metric("mlx_receiver_decoded_tokens_total"),
        pair.receiver_metric("mlx_receiver_kv_bytes_total"),
    )


def _model(path: Path | None, console: Console) -> Path:
    """The model's folder; SmolLM2 is fetched and converted when none is given."""
    if path is not None:
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"--model {path} is no model folder: it has no config.json")
        return path.resolve()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("Looking for the model", total=1.0)
        return fetch_smollm2(
            progress=lambda label, done: bars.update(task, description=label, completed=done)
        )


def _output_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    # Of no interest to the version control of wherever the demo was started.
    (path / ".gitignore").write_text("*\n")
    return path


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does: by way of every ``finally``.

    A signal that whoever started the demo has it ignore (``nohup``) stays ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
