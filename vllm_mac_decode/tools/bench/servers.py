"""The two servers that run already, as any client sees them."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from vllm_mac_decode.scheduler.order import HAND_OFF, KEEP
from vllm_mac_decode.tools import timeline
from vllm_mac_decode.tools.receiver_http import client
from vllm_mac_decode.tools.timeline.fetch import fetch

#: Token ids of random prompts: every vocabulary has them, and few are special ones.
_TOKEN_IDS = range(1000, 30000)

#: Seconds for one response.
_ANSWER_SECONDS = 600.0


class BenchError(Exception):
    """It cannot be measured; the text says why and what to do."""


@dataclass(frozen=True)
class Answer:
    """One streamed response: seconds from the request to each of its tokens."""

    request_id: str
    times: list[float]


@dataclass
class Server:
    """One OpenAI API. ``option`` is how the command line calls its URL."""

    url: str
    option: str
    api_key: str = ""
    model: str = ""
    #: What was loaded under that name, where the server says so: a folder or a Hugging Face id.
    root: str = ""
    max_model_len: int | None = None
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self.http = client(self.api_key, _ANSWER_SECONDS)

    def get(self, path: str) -> httpx.Response:
        """``GET path``. Raises BenchError."""
        try:
            answer = self.http.get(f"{self.url}{path}", timeout=10)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise BenchError(
                f"nothing answers at {self.url} ({error}): start it, or say where it is with "
                f"{self.option}"
            ) from None
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise BenchError(f"{self.url} wants its API key: {self.option}-api-key")
        if answer.status_code != httpx.codes.OK:
            raise BenchError(f"{self.url}{path} answers {answer.status_code}: {answer.text[:200]}")
        return answer

    def document(self, path: str) -> Any:
        """The JSON of ``GET path``. Raises BenchError."""
        try:
            return self.get(path).json()
        except ValueError:
            raise BenchError(f"{self.url}{path} is not what {self.option} means") from None

    def look(self) -> None:
        """Find out which model it serves. Raises BenchError."""
        try:
            listed = self.document("/v1/models")["data"][0]
            self.model = str(listed["id"])
            self.root = str(listed.get("root") or self.model)
            self.max_model_len = listed.get("max_model_len")
        except (LookupError, TypeError):
            raise BenchError(f"{self.url} lists no model: is it {self.option}?") from None

    def complete(self, prompt: list[int], tokens: int, **fields: Any) -> Answer:
        """Stream a greedy completion of exactly so many tokens. Raises BenchError."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        } | fields
        request_id, times, began = "", list[float](), time.perf_counter()
        try:
            with self.http.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                if answer.status_code != httpx.codes.OK:
                    said = answer.read().decode(errors="replace")[:300]
                    raise BenchError(f"{self.url} answers {answer.status_code}: {said}")
                for line in answer.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    request_id = chunk.get("id") or request_id
                    for choice in chunk.get("choices") or ():
                        new = choice.get("token_ids") or ()
                        times += [time.perf_counter() - began] * len(new)
        except (httpx.HTTPError, ValueError) as error:
            raise BenchError(f"{self.url} broke off: {error or type(error).__name__}") from None
        if len(times) != tokens:
            raise BenchError(f"{self.url} sent {len(times)} tokens, not {tokens}")
        return Answer(request_id, times)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        return sum(sample.value for sample in self._samples(name))

    def metric_by(self, label: str, name: str) -> dict[str, float]:
        """A metric's values by one of its labels."""
        return {sample.labels.get(label, ""): sample.value for sample in self._samples(name)}

    def _samples(self, name: str) -> list[Sample]:
        families = text_string_to_metric_families(self.get("/metrics").text)
        return [sample for family in families for sample in family.samples if sample.name == name]


class Pair:
    """vLLM and the receiver, asked for the same thing in three ways."""

    def __init__(self, vllm: Server, receiver: Server, tokens_in: int, tokens_out: int) -> None:
        self.vllm = vllm
        self.receiver = receiver
        self._in = tokens_in
        self._out = tokens_out
        self._source = random.Random()

    def look(self) -> None:
        """See that both are there and fit together. Raises BenchError."""
        self.vllm.look()
        self.receiver.look()
        for server in (self.vllm, self.receiver):
            most = server.max_model_len
            if most is not None and self._in + self._out > most:
                raise BenchError(
                    f"{server.url} takes {most} tokens, not {self._in} and {self._out} more: start "
                    "it with a larger --max-model-len, or give --prompt-tokens"
                )
        health = self.receiver.document("/health")
        if health.get("clients") == []:
            raise BenchError("no vLLM is connected to the receiver: `mac-decode check` says why")

    def _fresh(self) -> list[int]:
        """A prompt that no cache knows."""
        return self._source.choices(_TOKEN_IDS, k=self._in)

    def vllm_alone(self) -> list[float]:
        """Seconds to each token of a request that vLLM keeps."""
        before = self.receiver.metric("mlx_receiver_kv_bytes_total")
        answer = self.vllm.complete(self._fresh(), self._out, **KEEP)
        if self.receiver.metric("mlx_receiver_kv_bytes_total") > before:
            raise BenchError(
                "the receiver got KV of a request that vLLM was to keep: let nobody else use it "
                "while this runs"
            )
        return answer.times

    def mac_alone(self) -> list[float]:
        """Seconds to each token of a request that MLX prefills itself."""
        before = self.receiver.metric("mlx_receiver_kv_bytes_total")
        answer = self.receiver.complete(self._fresh(), self._out)
        if self.receiver.metric("mlx_receiver_kv_bytes_total") > before:
            raise BenchError(
                "the receiver had its prompt prefilled by vLLM: start it without --prefill, and "
                "let nobody else use it while this runs"
            )
        return answer.times

    def together(self) -> tuple[list[float], timeline.Handoff]:
        """Seconds to each token of a request that is handed off, and what the receiver says of
        it."""
        answer = self.vllm.complete(self._fresh(), self._out, **HAND_OFF)
        try:
            told = fetch(self.receiver.url, answer.request_id, self.receiver.api_key)
            handoff = timeline.parse(told)
        except timeline.TimelineError:
            raise BenchError(
                "vLLM decoded a request by itself that was to be handed off: `mac-decode check` "
                'and vLLM\'s log ("decoding locally") say why'
            ) from None
        if handoff.outcome != "finished" or handoff.first_decoded_ns is None:
            raise BenchError(f"a hand-off broke: {handoff.outcome}; see the receiver's log")
        return answer.times, handoff
