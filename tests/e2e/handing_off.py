"""One family's prompts through vLLM and a receiver, beside what MLX alone says: for the tests and
for ``bench/parity_cpu.py``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from tests import composites
from tests.conftest import cached_family
from tests.families import WINDOW, for_mlx, for_vllm, write
from tests.servers import Receiver, start_receiver
from tests.vision import seeing

OUTPUT: Final = 24
#: Shorter than a window, at its edges, longer; one that vLLM prefills in chunks.
LENGTHS: Final = (30, WINDOW - 1, WINDOW, WINDOW + 1, 100, 200)
PROMPTS: Final = [
    [1 + (7 * i + 3 * n) % 500 for i in range(length)] for n, length in enumerate(LENGTHS)
]

#: What is said in the second turn.
THEN: Final = [11, 12, 13, 14, 15, 16, 17]

#: vLLM 0.32's CPU kernel rotates queries and keys of three dimensions wrongly, as these models pass
#: them (``docs/models.md``); PyTorch does not.
NATIVE_ROTATION: Final = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
#: A chunk must be of whole blocks.
OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "lfm2": NATIVE_ROTATION, "deepseek_v2": NATIVE_ROTATION, "deepseek_v3": NATIVE_ROTATION,
    "glm4_moe_lite": NATIVE_ROTATION, "llama4": {"block_size": 32},
}  # fmt: skip

#: What ``tests.gated_delta_net`` is about.
GATED: Final = ("qwen3_next", "qwen3_5", "qwen3_5_moe")


class Offline:
    """vLLM in a process of its own, with one model after the other."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("w")
        self._process = self._started()
        self._sees = False
        self.log = log

    def _started(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.offline"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=os.environ | environment | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        )  # fmt: skip

    def see(self) -> None:
        """From now on vLLM has what it imports for models that also see."""
        if not self._sees:
            environment = seeing()  # it may skip the test, and the next one needs what runs
            self._end()
            self._process = self._started(**environment)
            self._sees = True

    def run(self, **order: Any) -> dict[str, Any]:
        """See ``tests.e2e.offline``."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert "error" not in answer, (answer, self.log.read_text()[-3000:])
        return answer

    def alone_and_together(
        self, model: Path, receiver_log: Path, **order: Any
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """The tokens of vLLM alone, and the answer of the same order with a receiver."""
        order |= {"model": str(model)}
        alone = self.run(receiver="", **order)["tokens"]
        receiver = start_receiver(model, receiver_log)
        try:
            return alone, self.run(receiver=receiver.address, **order)
        finally:
            receiver.server.stop()

    def said(self) -> str:
        """What the connector's log has."""
        lines = self.log.read_text(errors="replace").splitlines()
        ours = ("link.py", "fleet.py", "answers.py", "handoffs.py", "connector.py", "exporter.py")
        return "\n".join([line for line in lines if any(name in line for name in ours)][-20:])

    def close(self) -> None:
        """End it."""
        self._end()
        self._log.close()

    def _end(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@dataclass
class Outcome:
    """What a family's prompts gave, in two turns. Tokens are lists for each prompt and turn, of
    ``OUTPUT``: those of the second turn follow the others."""

    #: The folder that vLLM loaded.
    model: Path
    by_mlx_alone: list[list[int]]
    tokens: list[list[int]]
    #: Tokens that the receiver decoded; all but the first of each prompt if every one was handed
    #: off.
    handed_off: int
    #: The receiver's ``/handoffs``, its proof and its log.
    handoffs: list[dict[str, Any]]
    proof: str
    log: str

    @property
    def wanted(self) -> int:
        """``handed_off`` where nothing was decoded by vLLM."""
        return 2 * len(PROMPTS) * (OUTPUT - 1)


def by_mlx_alone(receiver: Receiver, prompt: list[int]) -> list[int]:
    """The receiver's own greedy tokens, through its API."""
    body = {"prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip
    answer = httpx.post(f"{receiver.url}/v1/completions", json=body)
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def _proof(log: str) -> str:
    """What the last comparison gave, as the receiver logs it."""
    found = re.findall(r"\d+ layers compared, .*", log)
    return found[-1] if found else ""


def hand_off(
    family: str,
    offline: Offline,
    folder: Path,
    options: dict[str, Any] | None = None,
    *,
    dtype: str = "float32",
    published: bool = False,
    **others: Any,
) -> Outcome:
    """All prompts at once; again where a busy machine let some responses go on locally.

    Writes the receiver's log into ``folder``. ``options`` are vLLM's, ``others`` go to a model's
    configuration that is written anew. ``published``: of a family whose published models also see,
    both engines load such a one.
    """
    if dtype != "float32" or others:
        written = write(family, folder / "model", dtype, **others)
    else:
        written = cached_family(family)
    of_vllm: dict[str, Any] = OPTIONS.get(family, {}) if options is None else options
    model, for_receiver = for_vllm(family, written), for_mlx(family, written)
    if published or family in composites.WHOLE:
        model = for_receiver = composites.folder(written)
        of_vllm = of_vllm | composites.TEXT_ALONE
        offline.see()
    receiver = start_receiver(for_receiver, folder / "receiver.log")
    try:
        alone = [by_mlx_alone(receiver, prompt) for prompt in PROMPTS]
        for _ in range(3):
            answer = offline.run(
                model=str(model),
                receiver=receiver.address,
                prompts=PROMPTS,
                tokens=OUTPUT,
                then=THEN,
                dtype=dtype,
                options=of_vllm,
            )
            receiver.assert_idle()
            first = answer["tokens"]
            second = [p + t + THEN for p, t in zip(PROMPTS, first, strict=True)]
            outcome = Outcome(
                model,
                alone + [by_mlx_alone(receiver, prompt) for prompt in second],
                first + answer["then"],
                int(answer["handed_off"]),
                httpx.get(f"{receiver.url}/handoffs").json(),
                _proof(log := receiver.server.log.read_text()),
                log,
            )
            refused = "do not compute the same cache" in outcome.log
            wrong = dtype == "float32" and outcome.tokens != outcome.by_mlx_alone
            if outcome.handed_off == outcome.wanted or refused or wrong:
                break
        return outcome
    finally:
        receiver.server.stop()
