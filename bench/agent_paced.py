"""The paced replay of an agent's trace: real export, link and receiver, engines that only wait.

As in ``bench.replay`` the two computations are waits of the published lengths (Llama-3.1-8B), and
everything between them is real: a paged cache, the exporter, a shaped link, the receiver's store
with the texts that it keeps, finished MLX caches. What differs, because the histories are long:

- All 32 layers of the sender's paged cache are one layer's memory, and so are the receiver's
  (as in ``bench.null_model``); each layer is still gathered, sent, landed, and, where the receiver
  copies an earlier text's cache, copied. One layer's bytes are compared after every call.
- The second token is the last that is waited for; the rest of the answer is put into the cache at
  once, which the link does not see.
- Calls that the trace makes at once are made one after the other.
- vLLM's prefix cache is the longest earlier prompt in whole blocks. It has no answer: those were
  decoded elsewhere, so they are prefilled again.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bench.agent_trace import Histories, agent_trace, longest_common
from bench.lab import Child, link_or_loopback, orders, tell
from bench.paced import (
    BLOCK,
    LAYERS,
    OUTPUT_TOKENS,
    PUBLISHED,
    STEP_TOKENS,
    Paged,
    Sending,
    decode_seconds,
    kv_bytes,
    meet_sender,
    one_layer,
    prefill_seconds,
    rows,
    sleep_until,
    wrong_planes,
)
from bench.transport import Receiving
from mlx_receiver.wire.messages import Open
from mlx_receiver.wire.sampling import Sampling

#: One token's K and V in all layers.
TOKEN_BYTES = kv_bytes(1)


def second_token_seconds(tokens: int) -> float:
    """A decode step of the Mac's at the published rate, behind so many tokens."""
    return decode_seconds(tokens) / OUTPUT_TOKENS


def modelled(prompt: Sequence[int], texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Seconds of either machine alone, with a prefix cache of its own; nothing is measured.

    Both have the KV of every earlier text with its answer: the Mac token by token, vLLM in blocks.
    The Mac's prefill is the Spark's with the published factor between them, and so is vLLM's decode
    step the Mac's.
    """
    count = len(prompt)
    there = min(longest_common(prompt, texts), count - 1)
    blocks = there - there % BLOCK
    slower = PUBLISHED["mac_prefill"] / PUBLISHED["spark_prefill"]
    mac = slower * prefill_seconds(there, count)
    vllm = prefill_seconds(blocks, count)
    step = second_token_seconds(count)
    return {
        "mac_alone_ttft_s": mac,
        "mac_alone_second_s": mac + step,
        "vllm_alone_ttft_s": vllm,
        "vllm_alone_second_s": vllm + step * PUBLISHED["spark_decode"] / PUBLISHED["mac_decode"],
    }


# --- the Mac's process ----------------------------------------------------------------------


class Keeping(Receiving):
    """The receiver's side of one call after the other."""

    def begin(self, number: int, prompt: list[int], answer: int) -> None:
        """Open a session."""
        self._done.clear()
        message = Open(number, "bench", prompt, Sampling(max_tokens=answer))
        self.session = self.store.open(message, self, self._layout)
        self.in_place = self.session.beginning.alone

    def build(self) -> tuple[float, list[Any]]:
        """As ``SessionService``: wait for the last block and build the caches."""
        if not self._done.wait(300) or self._failure:
            raise RuntimeError(self._failure or self.session.missing())
        complete = time.monotonic()
        session = self.session
        self._keep = self.store.earlier.keeper(
            session.partition,
            session.layout,
            session.reservation,
            session.tokens,
            session.beginning,
        )
        buffers = session.take_memory()
        self.store.built(session)
        return complete, buffers.build()

    def finish(self, caches: list[Any], answer: list[int]) -> None:
        """Decode the answer into the cache, and keep the text."""
        import mlx.core as mx

        session = self.session
        (cache, *_), start = caches, session.tokens
        caches.clear()
        new = [mx.array(rows(answer, start, plane)).view(mx.bfloat16)[None] for plane in range(2)]
        cache.update_and_fetch(*new)
        mx.eval(cache.state)
        text = [*session.prompt_token_ids, *answer]
        session.reservation.hold()
        if self._keep is not None and session.reservation.grow(len(text)):
            self._keep(text, [cache] * LAYERS)
        session.reservation.release()
        self.store.end(session, "finished")


def mac(transport: str, host: str, memory: str, keeps: str) -> None:
    """Receives, builds the caches, returns a token at the published pace, keeps the text."""
    import mlx.core as mx

    one_layer()
    mx.set_default_device(mx.cpu)
    mx.set_cache_limit(4 << 30)
    side = Keeping(transport, host, LAYERS, memory=int(memory), keeps=keeps == "True")
    lines = meet_sender(side, host)
    for _ in orders():
        message = lines.hear()
        side.begin(message["open"], message["prompt"], len(message["answer"]))
        lines.hear()  # the first token: prefill is over
        complete, caches = side.build()
        built = time.monotonic()
        sleep_until(built + second_token_seconds(side.session.tokens))
        lines.say(token=1)
        session = side.session
        wrong = wrong_planes(caches[0], session.prompt_token_ids)
        side.finish(caches, message["answer"])
        lines.say(kept=True)
        if wrong:
            raise RuntimeError(f"{wrong} planes differ from what was sent")
        tell(
            complete=complete,
            built=built,
            held_tokens=session.held_tokens,
            kv_bytes=session.kv_bytes,
            in_place=side.in_place,
            texts=len(side.store.residents),
            resident_bytes=side.store.residents.nbytes,
        )


# --- the Spark's process --------------------------------------------------------------------


def spark(told_json: str, control: str, tokens: str) -> None:
    """ "Prefills" at the published pace through the real exporter and waits for the tokens."""
    from vllm_mac_decode.export import ExportSpan

    paged = Paged(int(tokens))
    side = Sending(told_json, control, paged.layers)
    lines = side.lines
    prompts: list[list[int]] = []
    tell(ready=True)
    for order in orders():
        session, prompt = order["session"], order["prompt"]
        request, count = f"replay-{session}", len(prompt)
        cached = min(longest_common(prompt, prompts), count - 1)
        cached -= cached % BLOCK
        prompts.append(prompt)
        paged.write(prompt)
        ends = [*range(cached + STEP_TOKENS, count, STEP_TOKENS), count]
        began = moment = time.monotonic()
        lines.say(open=session, prompt=prompt, answer=order["answer"])
        computed, sent = cached, 0
        for end in ends:
            blocks = list(range(sent // BLOCK, -(-end // BLOCK)))
            span = ExportSpan(session, request, sent, end, count, [blocks])
            moment = side.prefill([span], session, moment, prefill_seconds(computed, end))
            computed = sent = end
        prefilled = time.monotonic()
        lines.say(first_token=0)
        lines.hear()
        second = time.monotonic()
        lines.hear()  # the text is kept
        side.over(session, request)
        tell(began=began, prefilled=prefilled, second=second, cached_tokens=cached)
    side.close()


# --- measuring ------------------------------------------------------------------------------


def replay(
    link: str, keeps: bool, *, seed: int, turns: int, every: int, memory: int, transport: str
) -> tuple[list[dict[str, Any]], str]:
    """A row for each call, or for every so many; without ``keeps`` no call depends on another one.
    And what could not be done, in words."""
    histories, texts = Histories(), []
    calls = [call for step in agent_trace(seed, turns=turns) for call in step]
    prompts = []
    for call in calls:
        prompt = histories.prompt(call)
        answer = [20 + (31 * at + 7 * len(prompts)) % 40000 for at in range(call.answer)]
        histories.answered(call, prompt, answer)
        prompts.append((call, prompt, answer))
    longest = max(len(prompt) for _, prompt, _ in prompts)
    found = []
    with contextlib.ExitStack() as stack:
        places, skipped = stack.enter_context(link_or_loopback(link))
        at_spark, at_mac = places
        me = ("-m", "bench.agent_paced")
        arguments = ("mac", transport, at_mac.address, str(memory), str(keeps))
        receiver = stack.enter_context(Child(at_mac, *me, *arguments))
        ready = receiver.answer()
        arguments = ("spark", json.dumps(ready), str(ready["control"]), str(longest + BLOCK))
        sender = stack.enter_context(Child(at_spark, *me, *arguments))
        sender.answer()
        for number, (call, prompt, answer) in enumerate(prompts):
            row = {
                "who": call.who,
                "turn": call.turn,
                "prompt_tokens": len(prompt),
                "new_tokens": len(prompt) - longest_common(prompt, texts),
                "answer_tokens": len(answer),
                "stripped_tokens": call.stripped,
            } | modelled(prompt, texts)
            texts.append([*prompt, *answer])
            if number % every:
                continue
            receiver.order()
            ours = sender.ask(session=number + 1, prompt=prompt, answer=answer)
            theirs = receiver.answer()
            row |= {
                "cached_tokens": ours["cached_tokens"],
                "held_tokens": theirs["held_tokens"],
                "kv_bytes": theirs["kv_bytes"],
                "in_place": theirs["in_place"],
                "ttft_s": ours["prefilled"] - ours["began"],
                "second_s": ours["second"] - ours["began"],
                "exposed_s": max(0.0, theirs["built"] - ours["prefilled"]),
                "resident_bytes": theirs["resident_bytes"],
                "texts": theirs["texts"],
            }
            found.append(row)
    return found, skipped


def fit(points: Sequence[tuple[float, float, float]]) -> Iterator[float]:
    """Least squares of (x, y, value): what value grows by with x, with y, and what there is."""
    matrix = np.array([[x, y, 1.0] for x, y, _ in points])
    values = np.array([value for *_, value in points])
    yield from (float(found) for found in np.linalg.lstsq(matrix, values, rcond=None)[0])


if __name__ == "__main__":
    {"mac": mac, "spark": spark}[sys.argv[1]](*sys.argv[2:])
