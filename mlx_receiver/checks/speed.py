"""``mlx-receiver profile``: measure how fast this machine is with a model."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mlx_receiver.caches.memory import Budget
from mlx_receiver.decode.engine import DecodeEngine
from mlx_receiver.decode.model import find_model
from mlx_receiver.decode.speed import Speed
from mlx_receiver.planning import cached
from mlx_receiver.receiver import default_kv_memory
from mlx_receiver.wire.profile import Coding, Profile

#: Prompts, in tokens, and texts decoded together, that are printed.
_LENGTHS = (128, 1024, 8192)
_BATCHES = (1, 8)


def run_and_print(model: str, dtype: str, most_rows: int, as_json: bool) -> int:
    """Measure, print, and keep it for the receiver; the exit status. Raises ModelError."""
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    screen = Console(stderr=True)
    hidden = not screen.is_terminal
    with Progress(*columns, console=screen, transient=True, disable=hidden) as bar:
        task = bar.add_task("Loading", total=None)

        def loading(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        source = find_model(model)
        engine = DecodeEngine(
            source, dtype=dtype, max_batch=most_rows, progress=loading, warm_up=True
        )
        engine.start()
        try:
            loaded = engine.wait_loaded()
            assert loaded is not None
            budget = Budget()
            budget.configure(loaded.cache, default_kv_memory(loaded))
            speed = Speed(source, loaded, budget, most_rows, fresh=True)
            speed.show = lambda share: bar.update(
                task, description="Measuring", completed=share, total=1.0
            )
            engine.observe(speed)
            while not speed.finished.wait(0.2):
                pass
        finally:
            engine.stop()
    profile, saved = speed.profile, speed.saved
    console = Console(highlight=False, soft_wrap=True)
    if profile is None or saved is None:
        console.print("It could not be measured: there is not enough memory beside the model.")
        return 1
    if as_json:
        print(msgspec.json.encode(saved).decode())
        return 0
    console.print(_table(profile))
    if (coding := profile.coding) != Coding():
        console.print(
            f"KV that comes quantised becomes {coding.q8 / 1e9:.2f} GB/s (q8) or "
            f"{coding.q4 / 1e9:.2f} GB/s (q4) of raw KV for each connection, up to "
            f"{coding.threads:.1f} times that"
        )
    console.print(
        f"Measured in {saved.seconds:.1f} s with {saved.samples} samples, of which half are within "
        f"{100 * saved.prefill_error:.1f} % (prefill) and {100 * saved.decode_error:.1f} % (decode)"
    )
    file = cached.path("receiver", speed.key)
    if not saved.reliable:
        console.print(
            "It is not kept: the machine had other work. End that, and measure once more."
        )
    elif file.exists():
        console.print(f"Kept in {file}: a receiver with this model begins with it.")
    return 0


def _table(profile: Profile) -> Table:
    table = Table(title=f"{profile.model} on {profile.device}")
    for heading in ("tokens", "prefill", *(f"decode, {rows} at once" for rows in _BATCHES)):
        table.add_column(heading, justify="right")
    for tokens in _LENGTHS:
        rates = [tokens / profile.prefill.seconds(tokens)]
        rates += [rows / profile.decode.seconds(tokens, rows) for rows in _BATCHES]
        table.add_row(f"{tokens:,}", *(f"{rate:,.1f} tokens/s" for rate in rates))
    return table
