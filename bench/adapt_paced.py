"""Both sides of ``bench.adapt``: engines that only wait, and everything between them as it is.

The receiver is a whole one, with a model that computes nothing and takes the time that ``MAC``
says; it measures that by itself, as any receiver does. vLLM's side is a loop that schedules,
"prefills" and "decodes" in the time that ``VLLM`` says, around the real relay, link, planner and
exporter. All layers of the sender's cache are one layer's memory, whose numbers nobody looks at:
``bench.agent_paced`` and the tests do.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.lab import orders, tell
from mlx_receiver.wire.layout import full_attention
from mlx_receiver.wire.profile import Decode, Prefill, Profile
from tests.vllm_mac_decode.plain import Output, Outputs, Params, Request, Stats

LAYERS, HEADS, HEAD_DIM, BLOCK = 8, 4, 64, 64
LAYOUT = full_attention(LAYERS, HEADS, HEAD_DIM, "bfloat16")
PROMPT, OUTPUT = 4096, 24

#: The Mac takes four times as long for a prompt, vLLM 2.5 times as long for a token.
VLLM = Profile("paced", "adapt", Prefill(0.0, 0.3 / PROMPT, 0.0, PROMPT), Decode(0.045, 0.005, 0.0))
MAC = Profile("paced", "adapt", Prefill(0.0, 1.2 / PROMPT, 0.0, 2048), Decode(0.015, 0.005, 0.0))

TOKEN = "adapt-bench-token"
SHAPE = {
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS,
    "num_attention_heads": HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 2 * PROMPT,
}


# --- the Mac's process ----------------------------------------------------------------------


def _paced_model() -> None:
    """Have ``mlx_lm``'s Llama be one that waits instead of computing."""
    import mlx.core as mx

    from bench.null_model import Model, ModelArgs

    class Paced(Model):
        def __call__(self, tokens: Any, cache: list[Any]) -> Any:
            rows, count = tokens.shape
            seconds = MAC.decode.seconds(0, rows)
            if count > 1:
                seconds = MAC.prefill.token * rows * count
            time.sleep(seconds)
            return super().__call__(tokens, cache)

    mx.set_default_device(mx.cpu)
    llama = ModuleType("mlx_lm.models.llama")
    llama.Model, llama.ModelArgs = Paced, ModelArgs  # type: ignore[attr-defined]
    sys.modules[llama.__name__] = llama


class Nobody:
    """Whose texts keep the Mac busy."""

    def decoded(self, outputs: list[Any]) -> None:
        """See ``jobs.Sink``."""

    def failed(self, job: Any, code: str, reason: str) -> None:
        """See ``jobs.Sink``."""
        raise RuntimeError(reason)


def mac(host: str, model: str, cache: str) -> None:
    """A receiver; each order says how many texts others have it decode."""
    os.environ["XDG_CACHE_HOME"] = cache  # what it measures is no figure of this machine's
    _paced_model()
    from mlx_receiver.decode.jobs import Job
    from mlx_receiver.receiver import Receiver
    from mlx_receiver.settings import Settings
    from mlx_receiver.wire.sampling import Sampling

    settings = Settings(
        model=model, host=host, port=0, http_port=None, token=TOKEN, discovery=False,
        kv_memory=2 << 30, prompt_cache=False,
    )  # fmt: skip
    with Receiver(settings) as receiver:
        speed = receiver.speed
        speed.finished.wait(120)
        profile = speed.profile
        if profile is None:
            raise RuntimeError("the receiver did not measure itself")
        tell(
            port=receiver.port,
            prefill_s=profile.prefill.seconds(PROMPT),
            decode_s=profile.decode.seconds(PROMPT),
        )
        busy: list[Job] = []
        for order in orders():
            for job in busy:
                receiver.engine.cancel(job)
            busy = [
                Job([1, 2, 3], Sampling(max_tokens=2 * PROMPT - 10, temperature=0.0), Nobody())
                for _ in range(order["rows"])
            ]
            for job in busy:
                receiver.engine.submit(job)
            tell(rows=len(busy))


# --- the Spark's process --------------------------------------------------------------------


@dataclass
class Row:
    """A request in the engine; ``ours``: the relay knows it."""

    request: Request
    ours: bool = True
    left: int = PROMPT


@dataclass
class Paced:
    """An engine that waits, as the relay's port."""

    max_model_len: int = 2 * PROMPT
    draining: bool = False
    weights_changed: bool = False
    prefixes: None = None
    rules: Any = None
    waiting: deque[Row] = field(default_factory=deque)
    rows: list[Row] = field(default_factory=list)
    #: When each request's last token came.
    ended: dict[str, float] = field(default_factory=dict)
    fallbacks: int = 0

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.rows)

    def load(self, besides: str) -> Any:
        from vllm_mac_decode.scheduler.port import EngineLoad

        found = [r for r in self.waiting if r.request.request_id != besides]
        pending = tuple((row.request.request_id, row.left) for row in found)
        return EngineLoad(len(pending), pending, len(self.rows))

    def wake(self) -> None:
        """It looks by itself."""

    def is_length(self, output: Output) -> bool:
        return output.finish_reason == "length"

    def _came(self, name: str, finish: str | None) -> None:
        if finish:
            self.ended[name] = time.monotonic()

    def emit(self, client: int, outputs: list[Output]) -> None:
        for output in outputs:
            self._came(output.request_id, output.finish_reason)

    def emit_aborted(self, request: Request) -> None:
        self._came(request.request_id, "abort")

    def emit_decoded(self, decoded: list[tuple[Request, Any]]) -> None:
        for request, tokens in decoded:
            self._came(request.request_id, tokens.finish)

    def resume(self, request: Request, as_id: str, tokens: list[int], max_tokens: int) -> bool:
        self.fallbacks += 1
        self._came(request.request_id, "fallback")
        return False

    def requeue(self, request: Request) -> None:
        self.fallbacks += 1
        self._came(request.request_id, "fallback")

    def prefilled_elsewhere(
        self, request: Request, cached: int, arrived: float, begun: float
    ) -> None:
        """Nobody counts."""

    def continue_output(self, output: Output, request_id: str) -> None:
        output.request_id = request_id


class Spark:
    """The engine's loop around the relay and the exporter."""

    def __init__(self, host: str, port: int, offload: str, model: str) -> None:
        import json

        from bench.paced import exported, paged_layer
        from mlx_receiver.wire.handshake import Introduction
        from mlx_receiver.wire.signature import signature_from_config
        from vllm_mac_decode.scheduler.fleet import Fleet
        from vllm_mac_decode.scheduler.port import EngineRules
        from vllm_mac_decode.scheduler.relay import Relay
        from vllm_mac_decode.settings import Settings
        from vllm_mac_decode.worker.exporter import Exporter
        from vllm_mac_decode.worker.ledger import BlockLedger

        settings = Settings(
            receiver=f"{host}:{port}", token=TOKEN, discovery=False, proof=False,
            shadow_prefill=False, offload=offload, stall_timeout=20.0, profile=False,
        )  # type: ignore[arg-type]  # fmt: skip
        self.port = Paced(rules=EngineRules())
        self.relay = Relay(settings)
        self.relay.engine = self.port  # type: ignore[assignment]
        config = json.loads((Path(model) / "config.json").read_text())
        signature = signature_from_config(config)
        self.relay.vocab_size, self.relay.layout = signature.vocab_size, LAYOUT
        self.relay.profiling.estimate.measured(VLLM)
        self._plan = ""
        decide = self.relay._planning.decide

        def noted(*args: Any) -> Any:
            plan = decide(*args)
            self._plan = plan.decision.text
            return plan

        self.relay._planning.decide = noted  # type: ignore[method-assign]
        self._ledger = BlockLedger()
        cache, layout = paged_layer(PROMPT // BLOCK, HEADS, BLOCK, HEAD_DIM)
        self._exporter = Exporter(exported([cache] * LAYERS, layout), settings, self._ledger)
        me = Introduction(signature, LAYOUT, client="adapt", engine="paced", model=model)
        self._fleet = Fleet(settings, me, self.relay.join)
        self._blocks = [list(range(PROMPT // BLOCK))]
        self._number = 0
        until = time.monotonic() + 30
        while not any(remote.welcome for remote in self.relay._receivers):
            if time.monotonic() > until:
                raise RuntimeError("the receiver was not found")
            time.sleep(0.05)
        time.sleep(0.5)

    def request(self, queue: int, rows: int) -> dict[str, Any]:
        """One request, behind ``queue`` others' prompts and beside ``rows`` texts."""
        port = self.port
        while len([row for row in port.rows if not row.ours]) < rows:
            port.rows.append(Row(self._new(1 << 20), ours=False))
        others = [row for row in port.rows if not row.ours][:rows]
        port.rows = [row for row in port.rows if row.ours] + others
        while len(port.waiting) < queue:
            port.waiting.append(Row(self._new(1), ours=False))
        request = self._new(OUTPUT)
        name = request.request_id
        self.relay.take_counts()
        began = time.monotonic()
        port.waiting.append(Row(request))
        if self.relay.on_new_request(request):  # type: ignore[arg-type]
            port.waiting.pop()
        while name not in port.ended:
            if time.monotonic() - began > 60:
                raise RuntimeError("a request did not end")
            self._step()
        counts = self.relay.take_counts()
        (plan,) = counts.plans
        errors = list(counts.plan_errors)
        return {
            "seconds": port.ended.pop(name) - began,
            "strategy": plan.partition(":")[0],
            "reason": plan.partition(":")[2],
            "error": errors[0] if errors else None,
            "plan": self._plan,
            "rate": self.relay._receivers[0].throughput.link.rate,
        }

    def _new(self, tokens: int) -> Request:
        self._number += 1
        return Request(f"r{self._number}", [1 + self._number % 100] * PROMPT, Params(tokens))

    def _step(self) -> None:
        """One step of the engine: a prompt, or a token of each text; each text has one in both."""
        port, outputs = self.port, []
        decoding = list(port.rows)
        if port.waiting:
            row = port.waiting[0]
            self._prefill(row)
            port.waiting.popleft()
            decoding.append(row)
            port.rows.append(row)
        elif decoding:
            self._ended()
            time.sleep(VLLM.decode.seconds(0, len(decoding)))
        else:
            self._ended()
            time.sleep(0.002)
        for row in decoding:
            request = row.request
            request.output_token_ids.append(5)
            over = len(request.output_token_ids) >= request.max_tokens
            if over:
                port.rows.remove(row)
            if row.ours:
                outputs.append(Output(request.request_id, [5], "length" if over else None))
        if outputs:
            group = Outputs(outputs, Stats())
            self.relay.rewrite({0: group})  # type: ignore[dict-item]
            port.emit(0, group.outputs)

    def _prefill(self, row: Row) -> None:
        from mlx_receiver.planning.cost import Strategy
        from vllm_mac_decode.export import ExportSpan

        name, spans = row.request.request_id, []
        session = self.relay.scheduled(name) if row.ours else None
        if session is not None:
            meets = session.strategy is Strategy.MEET
            spans = [
                ExportSpan(session.session, name, 0, PROMPT, PROMPT, self._blocks, from_end=meets)
            ]
        self._exporter.begin_step(
            spans, self.relay.take_ended(), self.relay.targets({s.session for s in spans})
        )
        began, seconds = time.monotonic(), VLLM.prefill.seconds(PROMPT)
        for index in range(LAYERS):
            time.sleep(max(0.0, began + seconds * (index + 1) / LAYERS - time.monotonic()))
            self._exporter.layer_written(f"layers.{index}")
        self._exporter.end_step()
        self._ledger.finished({name})

    def _ended(self) -> None:
        if self.relay.has_news():
            self._exporter.begin_step([], self.relay.take_ended(), {})
            self._exporter.end_step()

    def close(self) -> None:
        """End its threads."""
        self._fleet.close()
        self._exporter.close()


def spark(host: str, port: str, offload: str, model: str) -> None:
    """vLLM's side; each order is one request."""
    side = Spark(host, int(port), offload, model)
    tell(ready=True)
    for order in orders():
        tell(**side.request(order["queue"], order["rows"]), fallbacks=side.port.fallbacks)
    side.close()


if __name__ == "__main__":
    {"mac": mac, "spark": spark}[sys.argv[1]](*sys.argv[2:])
