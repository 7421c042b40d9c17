"""The next token's distribution at given positions of a text, asked for in three ways.

Two requests need a trick, since a server's own choice of a token must not matter. A hand-off's
first token is vLLM's and its second the Mac's: the text's own two tokens are the only ones allowed,
``min_tokens`` keeps the second, a stop token, out of the first place, and a bias puts it in the
second. Log-probabilities are those of the raw logits, which none of this changes.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any, Final

import httpx

from vllm_mac_decode.scheduler.order import HAND_OFF
from vllm_mac_decode.tools import timeline
from vllm_mac_decode.tools.bench.servers import BenchError, Server
from vllm_mac_decode.tools.quality.figures import TOP, Row
from vllm_mac_decode.tools.timeline.fetch import fetch

#: Output tokens that are asked for where two are wanted: so many that ``min_output_tokens`` keeps
#: nothing back.
_ENOUGH: Final = 64
_BIAS: Final = 100.0

#: Seconds in which the first hand-off must succeed: the engines may still be comparing caches.
READY_SECONDS: Final = 30.0

_NAME: Final = "token_id:"
_LOCAL: Final = "vllm:mac_decode_local_total"
_FRONT_DOOR: Final = "mlx_receiver_frontdoor_requests_total"


class QualityError(BenchError):
    """It cannot be measured; the text says why and what to do."""


class NotHandedOff(QualityError):
    """vLLM decoded by itself what it was to hand off."""


@dataclass(frozen=True)
class Continued:
    """A response's tokens, and what was said at each of their places."""

    request_id: str
    tokens: list[int]
    rows: list[Row]


class Engines:
    """A vLLM and the receiver that it hands off to. Safe to use from several threads."""

    def __init__(self, vllm: Server, receiver: Server) -> None:
        self.vllm = vllm
        self.receiver = receiver
        self._local: dict[str, float] = {}
        self._elsewhere = 0.0

    def look(self) -> None:
        """See that both are there. Raises BenchError."""
        self.vllm.look()
        self.receiver.look()
        self._local = self.vllm.metric_by("reason", _LOCAL)
        health = self.receiver.document("/health")
        if health.get("clients") == []:
            raise QualityError(
                f"no vLLM is connected to the receiver at {self.receiver.url}: `mac-decode check` "
                "says why"
            )
        self._elsewhere = self._prefilled_elsewhere()

    def longest(self, wanted: int) -> int:
        """Tokens that a text may have, at most ``wanted``: what both take with an answer."""
        most = [s.max_model_len for s in (self.vllm, self.receiver) if s.max_model_len]
        return min([wanted, *(length - _ENOUGH - 1 for length in most)])

    def wait_ready(self, tokens: list[int]) -> None:
        """Until a hand-off works. Raises NotHandedOff when none does in time, BenchError."""
        until = time.monotonic() + READY_SECONDS
        while True:
            try:
                self.handed_off(tokens)
                return
            except NotHandedOff:
                if time.monotonic() > until:
                    raise
            time.sleep(0.5)

    def read(self, text: str) -> list[int]:
        """The text's tokens, as vLLM's tokenizer has them. Raises BenchError."""
        answer = self._ask(self.vllm, text, 1, return_token_ids=True)
        found = answer["choices"][0].get("prompt_token_ids")
        if not found:
            raise QualityError(f"{self.vllm.url} does not tell token ids: is it a vLLM?")
        return [int(token) for token in found]

    def vllm_alone(self, tokens: list[int]) -> list[Row]:
        """What vLLM's own prefill says at each position; of the first it says nothing.

        Raises BenchError.
        """
        answer = self._ask(self.vllm, tokens, 1, prompt_logprobs=TOP)
        rows = answer["choices"][0].get("prompt_logprobs") or []
        if len(rows) != len(tokens):
            raise QualityError(f"{self.vllm.url} gives no prompt_logprobs: is it a vLLM?")
        return [
            {int(token): float(said["logprob"]) for token, said in (row or {}).items()}
            for row in rows
        ]

    def mac_alone(self, tokens: list[int]) -> Row:
        """What the receiver says in the last token's place after its own prefill of the others.

        Raises BenchError.
        """
        *before, last = tokens
        answer = self._logprobs(self.receiver, before, 1, allowed_token_ids=[last])
        return _row_of(answer, 0, last, self.receiver)

    def handed_off(self, tokens: list[int]) -> Row:
        """What the receiver says in the last token's place with vLLM's cache of all before the
        last two. These must differ. Raises NotHandedOff, BenchError."""
        *before, first, last = tokens
        answer = self._logprobs(
            self.vllm,
            before,
            _ENOUGH,
            allowed_token_ids=[first, last],
            stop_token_ids=[last],
            min_tokens=1,
            logit_bias={str(last): _BIAS},
            **HAND_OFF,
        )
        if answer.tokens[:1] != [first]:
            raise QualityError(f"{self.vllm.url} does not keep to min_tokens and allowed_token_ids")
        self._check_handed_off(answer)
        return _row_of(answer, 1, last, self.vllm)

    def response(self, prompt: list[int], tokens: int) -> Continued:
        """A greedy response that is handed off. Raises NotHandedOff, BenchError."""
        answer = self._logprobs(self.vllm, prompt, tokens, **HAND_OFF)
        self._check_handed_off(answer)
        return answer

    def check_alone(self) -> None:
        """Raise QualityError if the receiver had prompts prefilled by vLLM since ``look``."""
        if self._prefilled_elsewhere() > self._elsewhere:
            raise QualityError(
                "the receiver had its prompts prefilled by vLLM: start it without --prefill, or "
                "with a --prefill-min-tokens that is longer than the texts"
            )

    def _prefilled_elsewhere(self) -> float:
        return self.receiver.metric_by("path", _FRONT_DOOR).get("remote", 0.0)

    def _check_handed_off(self, answer: Continued) -> None:
        """Raise NotHandedOff unless the receiver knows of it, and decoded."""
        if len(answer.tokens) < 2:
            return
        try:
            told = fetch(self.receiver.url, answer.request_id, self.receiver.api_key)
            handoff = timeline.parse(told)
        except timeline.TimelineError:
            raise NotHandedOff(
                f"vLLM decoded a request by itself that was to be handed off{self._why()}"
            ) from None
        if handoff.first_decoded_ns is None or handoff.outcome not in ("", "finished"):
            raise NotHandedOff(f"a hand-off broke: {handoff.outcome}; see the receiver's log")

    def _why(self) -> str:
        """The reason that vLLM's metrics count most since ``look``."""
        now = self.vllm.metric_by("reason", _LOCAL)
        since = {reason: count - self._local.get(reason, 0.0) for reason, count in now.items()}
        # The requests of one token are ours.
        since.pop("short_output", None)
        reason = max(since, key=lambda name: since[name], default="")
        if reason and since[reason] > 0:
            return f" (reason {reason}, see docs/features.md): `mac-decode check` helps further"
        return (
            ': its log ("decoding locally") says why. Or it uses another receiver than '
            f"{self.receiver.url}"
        )

    def _logprobs(self, server: Server, prompt: list[int], tokens: int, **fields: Any) -> Continued:
        fields |= {"logprobs": TOP, "return_tokens_as_token_ids": True, "return_token_ids": True}
        # Every cache anew: what earlier answers left was computed by the other engine.
        fields["cache_salt"] = secrets.token_hex(8)
        answer = self._ask(server, prompt, tokens, **fields)
        try:
            choice = answer["choices"][0]
            logprobs = choice["logprobs"]
            rows = [
                {_id(name): value for name, value in top.items()} | {_id(token): own}
                for top, token, own in zip(
                    logprobs["top_logprobs"],
                    logprobs["tokens"],
                    logprobs["token_logprobs"],
                    strict=True,
                )
            ]
            return Continued(answer["id"], list(map(_id, logprobs["tokens"])), rows)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise QualityError(f"{server.url} gives no log-probabilities by token ids") from None

    def _ask(self, server: Server, prompt: str | list[int], tokens: int, **fields: Any) -> Any:
        body = {
            "model": server.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
        } | fields
        try:
            answer = server.http.post(f"{server.url}/v1/completions", json=body)
            if answer.status_code == httpx.codes.OK:
                return answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise QualityError(f"{server.url} broke off: {error or type(error).__name__}") from None
        raise QualityError(f"{server.url} answers {answer.status_code}: {answer.text[:300]}")


def _row_of(answer: Continued, index: int, token: int, server: Server) -> Row:
    """The row in which that token was forced."""
    if answer.tokens[index : index + 1] != [token]:
        raise QualityError(f"{server.url} does not keep to allowed_token_ids and logit_bias")
    return answer.rows[index]


def _id(name: str) -> int:
    return int(name.removeprefix(_NAME))
