"""Asking in turns, and writing what came out."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_mac_decode.settings import ENV_PREFIX, Settings, load
from vllm_mac_decode.tools import timeline
from vllm_mac_decode.tools.bench import picture, record
from vllm_mac_decode.tools.bench.servers import BenchError, Pair, Server
from vllm_mac_decode.tools.check.receiver import ReceiverChecks, read_model


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    vllm: str
    receiver_http: str
    receiver: str = ""
    token: str = ""
    vllm_api_key: str = ""
    receiver_api_key: str = ""
    prompt_tokens: int = 8192
    output_tokens: int = 32
    repeats: int = 5
    out: Path = Path("mac-decode-bench")


#: Called with what is being done, before each of ``steps``.
Show = Callable[[str], None]


def steps(options: Options) -> int:
    """How often ``show`` is called."""
    return 1 + len(record.WAYS) * (1 + options.repeats)


def measure(options: Options, show: Show) -> dict[str, Any]:
    """Everything, as the JSON file has it. Raises BenchError."""
    vllm = Server(options.vllm, "--vllm", options.vllm_api_key)
    receiver = Server(options.receiver_http, "--receiver-http", options.receiver_api_key)
    pair = Pair(vllm, receiver, options.prompt_tokens, options.output_tokens)
    pair.look()
    health = receiver.document("/health")
    show("link")
    link = _link(options, vllm)
    runs: dict[str, list[list[float]]] = {way: [] for way in record.WAYS}
    handoffs: list[timeline.Handoff] = []
    for turn in range(options.repeats + 1):
        # In another order each time: what slows a machine down for a while slows each way.
        for way in random.sample(record.WAYS, len(record.WAYS)):
            name = way.replace("_", " ").replace("vllm", "vLLM").replace("mac", "Mac")
            show(f"{name}, {turn} of {options.repeats}" if turn else f"{name}, warming up")
            handoff = None
            if way == "vllm_alone":
                times = pair.vllm_alone()
            elif way == "mac_alone":
                times = pair.mac_alone()
            else:
                times, handoff = pair.together()
            if turn:  # the first round makes buffers and kernels
                runs[way].append(times)
                handoffs += [handoff] if handoff is not None else []
    version = vllm.document("/version").get("version")
    return {
        "format": record.FORMAT,
        "date": record.now(),
        "model": record.public_model(vllm.root),
        "receiver_model": record.public_model(receiver.root),
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "repeats": options.repeats,
        "ways": {way: record.of_way(found) for way, found in runs.items()},
        "handoff": record.of_handoffs(runs["together"], handoffs),
        "link": link,
        "vllm": {
            "version": str(version),
            "hardware": record.hardware(),
            "versions": record.versions(),
        },
        "receiver": {
            "version": health.get("version"),
            "engine": health.get("engine"),
            "dtype": health.get("dtype"),
            "machine": health.get("machine"),
        },
    }


def _link(options: Options, vllm: Server) -> dict[str, Any]:
    """How fast KV reaches the receiver over each of its addresses, or why that is not known."""
    try:
        known = read_model(vllm.root)
        found = list(ReceiverChecks(_settings(options), known).findings())
    except (OSError, ValueError):
        return {"gb_per_s": None, "why": "the model's config.json cannot be read here"}
    timed = [finding.figures for finding in found if finding.figures.get("seconds")]
    if not timed:
        # Not the finding's own words: they name addresses.
        failed = next((finding.name for finding in found if finding.state != "fine"), "")
        return {"gb_per_s": None, "why": f"not timed, see `mac-decode check`: {failed}"}
    ways = [
        {
            "gb_per_s": round(float(figures["bytes"]) / float(figures["seconds"]) / 1e9, 3),
            "interface": figures["interface"],
        }
        for figures in timed
    ]
    # vLLM measures them, too, and takes the fastest.
    return {"gb_per_s": max(way["gb_per_s"] for way in ways), "addresses": ways}


def _settings(options: Options) -> Settings:
    """The receiver's control address: beside its HTTP port unless something else is said."""
    given = {"token": options.token, "receiver": options.receiver}
    if not options.receiver and not os.environ.get(f"{ENV_PREFIX}RECEIVER"):
        host = urlsplit(options.receiver_http).hostname or "127.0.0.1"
        given["receiver"] = f"[{host}]" if ":" in host else host
    return load({name: value for name, value in given.items() if value})


def write(result: dict[str, Any], out: Path) -> list[Path]:
    """The JSON file and the picture, beside one another; ``out`` has no suffix."""
    out.parent.mkdir(parents=True, exist_ok=True)
    document, drawing = out.with_name(f"{out.name}.json"), out.with_name(f"{out.name}.svg")
    document.write_text(json.dumps(result, indent=2) + "\n")
    drawing.write_text(picture.draw(result))
    return [document, drawing]


__all__ = ["BenchError", "Options", "measure", "steps", "write"]
