"""What the scheduler half sees of vLLM's requests and outputs, as plain objects: its rules are
tested in no time, and without vLLM. The end-to-end tests have the real ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Params:
    """``SamplingParams``."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words_token_ids: list[list[int]] | None = None
    eos_token_id: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    all_stop_token_ids: set[int] = field(default_factory=set)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    structured_outputs: Any = None
    thinking_token_budget: int | None = None
    repetition_detection: Any = None
    extra_args: dict[str, Any] | None = None


@dataclass
class Request:
    """``vllm.v1.request.Request``."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: Params
    kv_transfer_params: dict[str, Any] | None = None
    client_index: int = 0
    pooling_params: Any = None
    lora_request: Any = None
    mm_features: tuple[Any, ...] = ()
    prompt_embeds: Any = None
    cache_salt: str | None = None
    resumable: bool = False
    cache_salt: str | None = None
    block_hashes: list[Any] = field(default_factory=list)
    output_token_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.max_tokens = self.sampling_params.max_tokens

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


@dataclass
class Output:
    """``EngineCoreOutput``."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    kv_transfer_params: dict[str, Any] | None = None
    new_logprobs: Any = None


@dataclass
class Stats:
    """``SchedulerStats``."""

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0


@dataclass
class Outputs:
    """``EngineCoreOutputs``."""

    outputs: list[Output] = field(default_factory=list)
    scheduler_stats: Stats | None = None
    finished_requests: set[str] | None = None
