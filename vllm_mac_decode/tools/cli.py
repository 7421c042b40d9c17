"""The ``mac-decode`` command. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from mlx_receiver.discovery import cli as discovery
from mlx_receiver.options import command, typed
from mlx_receiver.pairing import cli as pairing
from mlx_receiver.pairing.cli import with_keystore
from mlx_receiver.settings import DEFAULT_HTTP_PORT
from vllm_mac_decode import __version__
from vllm_mac_decode.settings import ENV_PREFIX, Settings, SettingsError, load

app = command(
    "mac-decode",
    __version__,
    "Prefill with vLLM, decode on a Mac with MLX: see, trace and check the hand-off.",
)


@app.command()
def demo(
    prompt: Annotated[
        str, typer.Option(help="What to ask. Default: a text of some 450 tokens to summarise.")
    ] = "",
    model: Annotated[
        Path | None,
        typer.Option(help="A model folder. Default: SmolLM2-135M-Instruct, fetched once."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to answer with at most.")] = 64,
    out: Annotated[
        Path, typer.Option(help="Folder for the pictures, the trace and the servers' logs.")
    ] = Path("mac-decode-demo"),
) -> None:
    """Hand one request from vLLM to MLX on this machine, draw it, and check every token.

    The last line on stdout is a JSON object; the exit status is 0 only if everything in it held.
    """
    from vllm_mac_decode.tools.demo.run import Options, run

    options = Options(model=model, max_tokens=max_tokens, out=out)
    if prompt.strip():
        options = Options(prompt, model, max_tokens, out)
    raise typer.Exit(run(options))


@app.command()
@typed(Settings, ENV_PREFIX, "receiver")
def pair(
    code: Annotated[
        str, typer.Argument(help="The code that the receiver shows; asked for if it is left out.")
    ] = "",
    http_port: Annotated[int, typer.Option(help="The receiver's --http-port.")] = DEFAULT_HTTP_PORT,
    *,
    receiver: str,
) -> None:
    """Pair this machine with a receiver, once: from then on vLLM finds it and may use it."""
    from vllm_mac_decode.tools.pair import pair_with

    code = code or typer.prompt("The code that the receiver shows")
    with_keystore("vllm", _give_up, lambda keystore: pair_with(keystore, receiver, http_port, code))


_ReceiverHttp = Annotated[
    str, typer.Option(envvar="MAC_DECODE_RECEIVER_HTTP", help="The receiver's HTTP address.")
]
_VllmApiKey = Annotated[
    str, typer.Option(envvar="VLLM_API_KEY", help="vLLM's --api-key.", show_default=False)
]
_ReceiverApiKey = Annotated[
    str,
    typer.Option(
        envvar="MLX_RECEIVER_API_KEY", help="The receiver's --api-key.", show_default=False
    ),
]
_Token = Annotated[
    str,
    typer.Option(envvar="MAC_DECODE_TOKEN", help="The receiver's --token.", show_default=False),
]


@app.command()
def trace(
    receiver_http: _ReceiverHttp = "http://127.0.0.1:7791",
    request: Annotated[
        str, typer.Option(help="A request id, as the response shows it, or latest.")
    ] = "latest",
    out: Annotated[
        Path | None, typer.Option(help="Also write the trace, for ui.perfetto.dev.")
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(help="Also draw it; .svg, .png or .pdf (needs matplotlib).")
    ] = None,
    api_key: _ReceiverApiKey = "",
) -> None:
    """Show the timeline of a hand-off that the receiver remembers."""
    import json

    from rich.console import Console

    from vllm_mac_decode.tools import timeline
    from vllm_mac_decode.tools.timeline import plot as timeline_plot
    from vllm_mac_decode.tools.timeline import text as timeline_text
    from vllm_mac_decode.tools.timeline.fetch import fetch

    try:
        handoff = timeline.parse(fetch(receiver_http, request, api_key))
        if out is not None:
            out.write_text(json.dumps(timeline.trace_events(handoff)))
        if svg is not None:
            timeline_plot.draw(handoff, svg)
    except (timeline.TimelineError, OSError, ValueError) as error:
        _give_up(str(error))
    except ModuleNotFoundError as error:
        _give_up(f"drawing needs {error.name}: pip install {error.name}")
    console = Console(highlight=False)
    console.print(f"[bold]{handoff.request_id}[/]: {timeline_plot.headline(handoff)}")
    console.print(timeline_plot.caption(handoff))
    console.print(timeline_text.render(handoff, console.width))
    if written := [str(path) for path in (out, svg) if path]:
        console.print(f"Written: {', '.join(written)}", soft_wrap=True)


@app.command()
@typed(Settings, ENV_PREFIX, "receiver", "token")
def check(
    model: Annotated[
        str,
        typer.Option(
            help="The model that vLLM will serve: compared with the receiver's own, and one layer "
            "of it is started."
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quality: Annotated[
        bool,
        typer.Option(
            "--quality",
            help="Instead: ask a vLLM and a receiver that run already how good a handed-off text "
            "is, compared with each of them alone.",
        ),
    ] = False,
    quality_text: Annotated[
        list[Path] | None,
        typer.Option(help="--quality along this text (UTF-8), can be repeated. Default: ours."),
    ] = None,
    quality_seconds: Annotated[
        float, typer.Option(min=1, help="--quality measures for no longer.")
    ] = 300,
    vllm: Annotated[
        str, typer.Option(envvar="MAC_DECODE_VLLM", help="vLLM's URL, for --quality.")
    ] = "http://127.0.0.1:8000",
    receiver_http: Annotated[
        str,
        typer.Option(
            envvar="MAC_DECODE_RECEIVER_HTTP",
            help="The receiver's HTTP address, for --quality. Default: port 7791 of --receiver.",
        ),
    ] = "",
    vllm_api_key: _VllmApiKey = "",
    receiver_http_api_key: _ReceiverApiKey = "",
    **given: str,
) -> None:
    """Say whether this machine is ready to hand requests off, and if not, what to do.

    The exit status is 0 if it is, 1 if it is not, 2 if the question makes no sense.
    """
    import msgspec
    from rich.console import Console
    from rich.markup import escape

    from vllm_mac_decode.tools.check import Report, run_checks
    from vllm_mac_decode.tools.check.finding import show

    if quality or quality_text:
        from vllm_mac_decode.tools.quality import command

        keys = (vllm_api_key, receiver_http_api_key)
        try:
            options = command.options(
                vllm, receiver_http, given["receiver"], keys, quality_text or [], quality_seconds
            )
        except (SettingsError, ValueError) as error:
            _give_up(str(error), 2)
        try:
            raise typer.Exit(command.run(options, as_json))
        except (command.BenchError, OSError) as error:
            _give_up(str(error))
    try:
        settings = load(given)
    except SettingsError as error:
        _give_up(str(error), 2)
    console = Console(highlight=False, soft_wrap=True, quiet=as_json)
    report = Report()
    with Console(stderr=True).status(
        "Checking (with --model vLLM is started, which takes a while)"
    ):
        for found in run_checks(settings, model):
            if isinstance(found, Report):
                report = found
                continue
            show(console, found)
    if as_json:
        typer.echo(msgspec.json.encode(report).decode())
    elif report.ready:
        console.print(f"[bold]Ready.[/] Start vLLM with:\n  {escape(report.command)}")
    else:
        console.print("[bold]Not ready.[/]")
    raise typer.Exit(0 if report.ready else 1)


@app.command()
def bench(
    vllm: Annotated[
        str, typer.Option(envvar="MAC_DECODE_VLLM", help="vLLM's URL.")
    ] = "http://127.0.0.1:8000",
    receiver_http: _ReceiverHttp = "http://127.0.0.1:7791",
    receiver: Annotated[
        str,
        typer.Option(
            help="host[:port] of the receiver's control port, to time the link. Default: "
            "MAC_DECODE_RECEIVER, else the host of --receiver-http."
        ),
    ] = "",
    token: _Token = "",
    vllm_api_key: _VllmApiKey = "",
    receiver_http_api_key: _ReceiverApiKey = "",
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens in.")] = 8192,
    output_tokens: Annotated[int, typer.Option(min=3, help="Tokens out.")] = 32,
    repeats: Annotated[
        int, typer.Option(min=1, help="Measured rounds, after one that warms up.")
    ] = 5,
    out: Annotated[
        Path, typer.Option(help="What to write, without a suffix: a .json and an .svg.")
    ] = Path("mac-decode-bench"),
) -> None:
    """Time the same request answered by vLLM alone, by the Mac alone, and by both together.

    vLLM (with --kv-connector mac_decode) and the receiver must be running, and nobody else should
    use them meanwhile. The published set-up is Llama-3.1-8B with the defaults.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from vllm_mac_decode.tools.bench import run

    options = run.Options(
        vllm=vllm, receiver_http=receiver_http, receiver=receiver, token=token,
        vllm_api_key=vllm_api_key, receiver_api_key=receiver_http_api_key,
        prompt_tokens=prompt_tokens, output_tokens=output_tokens, repeats=repeats, out=out,
    )  # fmt: skip
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    screen = Console(stderr=True)
    hidden = not screen.is_terminal
    try:
        with Progress(*columns, console=screen, transient=True, disable=hidden) as bar:
            task = bar.add_task("", total=run.steps(options), completed=-1)
            result = run.measure(
                options, lambda what: bar.update(task, description=what, advance=1)
            )
        written = run.write(result, out)
    except (run.BenchError, OSError) as error:
        _give_up(str(error))
    table = Table(title=f"{result['model']}: {prompt_tokens:,} tokens in, {output_tokens} out")
    for heading in ("", "first token", "last token", "p90"):
        table.add_column(heading, justify="right" if heading else "left")
    for way, name in (("vllm_alone", "vLLM alone"), ("mac_alone", "Mac alone"),
                      ("together", "together")):  # fmt: skip
        first, total = (result["ways"][way][key] for key in ("first_token_s", "total_s"))
        table.add_row(name, *(f"{s:.2f} s" for s in (first["p50"], total["p50"], total["p90"])))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"Written: {', '.join(map(str, written))}. They hold no addresses, keys or paths: attach "
        "them to an issue.",
        soft_wrap=True,
    )


@app.command()
@typed(Settings, ENV_PREFIX, "codec")
def plan(
    model: Annotated[
        str, typer.Option(help="A published model's name, or the path of a config.json.")
    ],
    prompt: Annotated[int, typer.Option(min=1, max=1 << 24, help="Tokens in.")] = 8192,
    output: Annotated[int, typer.Option(min=1, max=1 << 24, help="Tokens out.")] = 32,
    topology: Annotated[
        str,
        typer.Option(
            help="Which machines: PREFILL+DECODE@LINK, as in spark+m3-ultra@10gbe, or a TOML file. "
            "Default: what the two sides here have measured."
        ),
    ] = "",
    svg: Annotated[Path | None, typer.Option(help="Also draw it into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    receiver_http: _ReceiverHttp = "http://127.0.0.1:7791",
    api_key: _ReceiverApiKey = "",
    *,
    codec: str,
) -> None:
    """Predict what a request takes on vLLM alone, on the Mac alone, and shared between them."""
    import json

    from rich.console import Console

    from mlx_receiver.planning.plan import plan as planned
    from vllm_mac_decode.tools.plan import picture, show, sources
    from vllm_mac_decode.tools.profile.sources import ProfileError, shown

    try:
        receiver = None if topology else shown(receiver_http, api_key)
        streams = 1 if topology else load().slow_streams
        wanted, said = sources.situation(
            model, prompt, output, topology, codec, receiver, receiver_http, streams
        )
    except (ValueError, ProfileError) as error:
        _give_up(str(error), 2)
    made = planned(wanted, sources.codec(codec, wanted))
    if svg is not None:
        try:
            svg.write_text(picture.svg(made))
        except OSError as error:
            _give_up(str(error))
    if as_json:
        typer.echo(json.dumps(show.as_json(made, said)))
        return
    console = Console(highlight=False)
    console.print(show.render(made, said, console.width))
    if svg is not None:
        console.print(f"Written: {svg}", soft_wrap=True)


@app.command()
def profile(
    receiver_http: _ReceiverHttp = "http://127.0.0.1:7791",
    svg: Annotated[Path | None, typer.Option(help="Also draw it into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    api_key: _ReceiverApiKey = "",
) -> None:
    """Show how fast vLLM and the receiver compute the model, and how that is known.

    To be run on vLLM's machine: its own figures are in a file there. Exit status: 0 if both sides
    are known, 1 if not.
    """
    import msgspec
    from rich.console import Console

    from vllm_mac_decode.tools.profile import show, sources
    from vllm_mac_decode.tools.profile.svg import draw

    try:
        known = sources.both(receiver_http, api_key)
        links = sources.links(receiver_http, api_key)
        if svg is not None:
            svg.write_text(draw(known))
    except (sources.ProfileError, OSError) as error:
        _give_up(str(error))
    if as_json:
        sides: dict[str, object] = {
            one.side: {
                "profile": one.profile,
                "origin": one.origin,
                "measured": one.saved,
                "errors": one.errors,
            }
            for one in known
        }
        typer.echo(msgspec.json.encode(sides | {"links": links}).decode())
    else:
        console = Console(highlight=False)
        console.print(show.render(known, links, console.width))
    raise typer.Exit(0 if all(one.profile is not None for one in known) else 1)


def _give_up(text: str, status: int = 1) -> NoReturn:
    typer.echo(f"mac-decode: {text}", err=True)
    raise typer.Exit(status)


def _known() -> set[str]:
    from mlx_receiver.pairing.keystore import Keystore, PairingError
    from vllm_mac_decode.scheduler.candidates import known_keys

    try:
        return known_keys(Keystore("vllm"))
    except PairingError as error:
        _give_up(str(error))


discovery.add_command(app, _known)
pairing.add_commands(app, "vllm", "receivers", "", _give_up)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
