"""docs/features.md says of every reason for decoding locally what it means, and no more."""

from __future__ import annotations

import inspect
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import ReasoningConfig, StructuredOutputsConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.request import Request

from mlx_receiver.wire.sampling import Thinking
from tests.e2e.equality_cases import CASES, HANDED_OFF, NOT_DECODED
from tests.servers import Receiver, start_receiver
from tests.waiting import eventually
from vllm_mac_decode.engine.adapter import engine_rules
from vllm_mac_decode.scheduler import eligibility
from vllm_mac_decode.scheduler.decisions import PLANNED_LOCAL
from vllm_mac_decode.scheduler.eligibility import local_reason
from vllm_mac_decode.scheduler.fleet import Fleet
from vllm_mac_decode.scheduler.port import EngineRules
from vllm_mac_decode.scheduler.relay import Relay
from vllm_mac_decode.scheduler.remote import Remote
from vllm_mac_decode.settings import Settings
from vllm_mac_decode.tools.check import read_model

FEATURES = Path(__file__).parents[2] / "docs" / "features.md"


def request(max_tokens: int = 16, **fields: Any) -> Request:
    """A request as vLLM's engine gets it; ``fields`` go to its sampling parameters."""
    params = SamplingParams(max_tokens=max_tokens, **fields)
    params.update_from_generation_config({}, eos_token_id=2)
    return Request("r", [5, 6, 7], params, None)


def like(**attributes: Any) -> Request:
    """A request with other properties than its sampling parameters."""
    fields = {"request_id": "r", "prompt_token_ids": [5, 6, 7], "pooling_params": None,
              "sampling_params": SamplingParams(max_tokens=16)}  # fmt: skip
    return Request(**(fields | attributes))


def image() -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(None, "image", "x", PlaceholderRange(0, 1))


#: Reasons that a request gives, beside those of the equality battery's own requests.
REQUESTS = {
    "pooling": lambda: like(sampling_params=None, pooling_params=PoolingParams(task="embed")),
    "lora": lambda: like(lora_request=LoRARequest("a", 1, "/none")),
    "multimodal": lambda: like(mm_features=[image()]),
    "prompt_embeds": lambda: like(prompt_token_ids=None, prompt_embeds=_embeddings()),
    "streaming_input": lambda: like(resumable=True),
    "router": lambda: request(extra_args={"kv_transfer_params": {"do_remote_prefill": True}}),
    "short_output": lambda: request(1),
    "structured_output": lambda: request(
        structured_outputs=StructuredOutputsParams(regex="a"), min_tokens=2
    ),
    "logprobs": lambda: request(logprobs=-1),
    "logprob_token_ids": lambda: request(logprobs=0, logprob_token_ids=[5] * 21),
    "thinking_budget": lambda: request(thinking_token_budget=5),
    "extra_args": lambda: request(extra_args={"mine": 1}),
    "trace_decode": lambda: request(trace_decode_token_ids=[5]),
}


def _embeddings() -> Any:
    import torch

    return torch.zeros(3, 8)


def returned() -> set[str]:
    """Every label that there is in the code."""
    decide = (eligibility, engine_rules, Remote.local_reason, Relay._chosen, Relay._sampling)
    sources = [inspect.getsource(part) for part in decide]
    found = re.findall(r'(?:return|everything =) "(\w+)"', "".join(sources))
    assert len(found) > 15
    return {*found, *PLANNED_LOCAL.values(), "planned"}


def documented() -> set[str]:
    """The last column of the table of what vLLM decodes."""
    section = FEATURES.read_text().split("## Decoded by vLLM")[1].split("\n## ")[0]
    return set(re.findall(r"\| `(\w+)` \|$", section, re.MULTILINE))


def test_the_table_has_every_reason() -> None:
    assert documented() == returned()


def test_every_reason_is_tried() -> None:
    battery = {case.where for case in CASES} - {HANDED_OFF, NOT_DECODED}
    engine = {"short_prompt", "logprobs_mode", "logits_processors", "watermark"}
    # In tests/vllm_mac_decode/scheduler: they need a receiver's answers, or an engine's.
    answers = {"receiver_full", "receiver_context", "out_of_range", "reasoning"}
    answers |= {"offload_never", "offload_threshold", "planned"}
    assert battery | set(REQUESTS) | engine | set(UNAVAILABLE) | answers == documented()


@pytest.mark.parametrize("reason", REQUESTS)
def test_such_requests_stay_local(reason: str) -> None:
    assert local_reason(REQUESTS[reason](), Settings()) == reason


@pytest.mark.parametrize(
    "fields",
    [{}, {"min_tokens": 3}, {"min_tokens": 3, "stop_token_ids": [9]}, {"ignore_eos": True},
     {"min_tokens": 3, "ignore_eos": True}, {"logprobs": 0, "logprob_token_ids": [5]},
     {"structured_outputs": StructuredOutputsParams(regex="a")},
     {"logprobs": 20}, {"seed": 1, "temperature": 0.5}, {"bad_words": []},
     {"watermarking": True}],
    ids=str,
)  # fmt: skip
def test_others_are_handed_off(fields: dict[str, Any]) -> None:
    assert local_reason(request(**fields), Settings()) is None


def test_short_prompts_stay_local_where_that_is_set() -> None:
    assert local_reason(request(), Settings(min_prompt_tokens=4)) == "short_prompt"
    assert local_reason(request(), Settings(min_prompt_tokens=3)) is None


def rules(model: Path, **arguments: Any) -> EngineRules:
    """What vLLM's own configuration for these arguments means for hand-offs."""
    config = EngineArgs(model=str(model), dtype="float32", **arguments).create_engine_config()
    return engine_rules(config)


def test_engines_that_change_tokens_hand_nothing_off(tiny_llama_path: Path) -> None:
    assert rules(tiny_llama_path) == EngineRules()
    custom = rules(tiny_llama_path, logits_processors=["some.module:Processor"])
    assert local_reason(request(), Settings(), custom) == "logits_processors"
    marked = EngineRules(everything="watermark")
    assert local_reason(request(), Settings(), marked) == "watermark"


def test_only_raw_log_probabilities_are_the_receivers(tiny_llama_path: Path) -> None:
    processed = rules(tiny_llama_path, logprobs_mode="processed_logprobs")
    assert local_reason(request(logprobs=1), Settings(), processed) == "logprobs_mode"
    assert local_reason(request(), Settings(), processed) is None


def test_what_the_engine_says_of_grammars(tiny_llama_path: Path) -> None:
    compact = StructuredOutputsConfig(
        backend="guidance", disable_any_whitespace=True, disable_additional_properties=True
    )
    found = rules(tiny_llama_path, structured_outputs_config=compact)
    assert found == EngineRules(compact_json=True, closed_json=True)
    assert rules(tiny_llama_path, reasoning_parser="granite") == EngineRules(reasons=True)
    within = StructuredOutputsConfig(enable_in_reasoning=True)
    inside = rules(tiny_llama_path, reasoning_parser="granite", structured_outputs_config=within)
    assert inside == EngineRules()


def test_what_the_engine_says_of_reasoning(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is vLLM's own reading of its flags; its model runner has the rule."""

    def told(start: str, end: str, **arguments: Any) -> Thinking | None:
        marks = ReasoningConfig(reasoning_start_str=start, reasoning_end_str=end)
        return rules(tiny_llama_path, reasoning_config=marks, **arguments).thinking

    one = told("<file_sep>", "<filename>")
    assert one is not None and one == Thinking(0, one.start, one.end, one.end, "v1")
    assert len(one.start) == len(one.end) == 1 and one.start != one.end
    budget = request(thinking_token_budget=5)
    assert local_reason(budget, Settings(), EngineRules(thinking=one)) is None
    phrase = told("<file_sep>", "Enough of it.<filename>")
    assert phrase is not None and phrase.end == phrase.forced and phrase.forced[-1:] == one.end
    assert told("<file_sep> Well,", "<filename>") is None
    assert told("<file_sep>", "Enough of it. " * 400 + "<filename>") is None
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    assert told("<file_sep>", "<filename>", speculative_config=drafts) is None

    config = EngineArgs(
        model=str(tiny_llama_path),
        dtype="float32",
        reasoning_config=ReasoningConfig(
            reasoning_start_str="<file_sep> Well,", reasoning_end_str="<filename>"
        ),
    ).create_engine_config()
    assert engine_rules(config).thinking is None
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    found = engine_rules(config).thinking
    if hasattr(ReasoningConfig, "natural_reasoning_end_token_ids"):  # vLLM 0.28 on
        assert found is not None and found.runner == "v2" and len(found.start) > 1
    else:
        assert found is None


# --- reasons that are the moment's rather than the request's -------------------------------------

UNAVAILABLE = ("disabled", "no_receiver", "unproven", "circuit_open", "weights_changed")


@pytest.fixture
def receiver(tiny_llama_path: Path, tmp_path: Path) -> Iterator[Receiver]:
    """A receiver that no vLLM uses."""
    made = start_receiver(tiny_llama_path, tmp_path / "receiver.log")
    yield made
    made.server.stop()


def reason_now(relay: Relay) -> dict[str, int]:
    """How a new request is counted."""
    relay.on_new_request(like(request_id=uuid.uuid4().hex))
    return dict(relay.take_counts().local)


@pytest.mark.server
def test_a_receiver_that_is_not_there_or_fails_is_left_alone(
    receiver: Receiver, tiny_llama_path: Path
) -> None:
    settings = Settings(receiver=receiver.address)
    assert reason_now(Relay(Settings(enabled=False))) == {"disabled": 1}
    relay = Relay(settings)
    assert reason_now(relay) == {"no_receiver": 1}
    me = read_model(str(tiny_llama_path))
    # vLLM's engine is not needed to decide.
    engine = SimpleNamespace(
        rules=EngineRules(), weights_changed=False, max_model_len=2048, idle=False, draining=False
    )
    relay.engine = engine  # type: ignore[assignment]
    relay.vocab_size, relay.layout = me.signature.vocab_size, me.layout
    fleet = Fleet(settings, me, relay.join)
    try:
        assert eventually(lambda: any(remote.welcome for remote in relay._receivers))
        assert reason_now(relay) == {"unproven": 1}
        relay._receivers[0].proven = True
        assert reason_now(relay) == {}
        engine.weights_changed = True
        assert reason_now(relay) == {"weights_changed": 1}
        engine.weights_changed = False
        for _ in range(3):
            relay._receivers[0].failed()
        assert reason_now(relay) == {"circuit_open": 1}
    finally:
        fleet.close()
