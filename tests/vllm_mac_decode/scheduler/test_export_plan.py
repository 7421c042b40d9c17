"""Scheduler steps become spans: every prompt token once, in the blocks that hold it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_mac_decode.export import ExportSpan
from vllm_mac_decode.scheduler.export_plan import ExportPlan

BLOCK = 16

#: Tokens of each request's prompt.
PROMPTS: dict[str, int] = {}


@dataclass
class Step:
    """One scheduler step, built as vLLM builds it."""

    output: SchedulerOutput = field(default_factory=SchedulerOutput.make_empty)

    def new(self, req_id: str, blocks: list[int], computed: int, scheduled: int) -> Step:
        self.output.scheduled_new_reqs.append(
            NewRequestData(
                req_id=req_id,
                prompt_token_ids=[1],
                mm_features=[],
                sampling_params=SamplingParams(),
                pooling_params=None,
                block_ids=(blocks,),
                num_computed_tokens=computed,
                lora_request=None,
            )
        )
        self.output.num_scheduled_tokens[req_id] = scheduled
        return self

    def cached(self, req_id: str, blocks: list[int] | None, computed: int, scheduled: int) -> Step:
        cached: CachedRequestData = self.output.scheduled_cached_reqs
        cached.req_ids.append(req_id)
        cached.new_block_ids.append(None if blocks is None else (blocks,))
        cached.num_computed_tokens.append(computed)
        cached.num_output_tokens.append(0)
        self.output.num_scheduled_tokens[req_id] = scheduled
        return self

    def resumed(self, req_id: str, blocks: list[int], computed: int, scheduled: int) -> Step:
        self.output.scheduled_cached_reqs.resumed_req_ids.add(req_id)
        return self.cached(req_id, blocks, computed, scheduled)


def span(req_id: str, start: int, end: int, blocks: list[int], session: int = 7) -> ExportSpan:
    return ExportSpan(session, req_id, start, end, PROMPTS[req_id], [blocks])


def plan_for(*requests: tuple[str, int, int]) -> ExportPlan:
    plan = ExportPlan([BLOCK])
    for request_id, session, prompt_tokens in requests:
        plan.add(request_id, session, prompt_tokens)
        PROMPTS[request_id] = prompt_tokens
    return plan


def test_a_prompt_in_one_step() -> None:
    plan = plan_for(("a", 7, 40))
    assert plan.step(Step().new("a", [5, 9, 2], 0, 40).output) == [span("a", 0, 40, [5, 9, 2])]


def test_chunks_start_inside_the_block_where_the_last_one_ended() -> None:
    plan = plan_for(("a", 7, 50))
    assert plan.step(Step().new("a", [5, 9], 0, 20).output) == [span("a", 0, 20, [5, 9])]
    # The block list grows with the request.
    assert plan.step(Step().cached("a", [2], 20, 20).output) == [span("a", 20, 40, [9, 2])]
    # No new block: the chunk fits into what the request has.
    assert plan.step(Step().cached("a", None, 40, 5).output) == [span("a", 40, 45, [2])]
    assert plan.step(Step().cached("a", [11], 45, 5).output) == [span("a", 45, 50, [2, 11])]


def test_chunks_that_end_on_a_block_border_take_only_their_blocks() -> None:
    plan = plan_for(("a", 7, 48))
    assert plan.step(Step().new("a", [1, 2, 3], 0, 32).output) == [span("a", 0, 32, [1, 2])]
    assert plan.step(Step().cached("a", None, 32, 16).output) == [span("a", 32, 48, [3])]


def test_a_cached_prefix_goes_with_the_first_chunk() -> None:
    plan = plan_for(("a", 7, 60))
    first = Step().new("a", [30, 31, 4, 8], 32, 20).output
    assert plan.step(first) == [span("a", 0, 52, [30, 31, 4, 8])]
    assert plan.step(Step().cached("a", None, 52, 8).output) == [span("a", 52, 60, [8])]


def test_tokens_beyond_the_prompt_are_not_exported() -> None:
    plan = plan_for(("a", 7, 20), ("b", 8, 20))
    # Speculation and decoding may schedule more tokens than the prompt has left.
    assert plan.step(Step().new("a", [1, 2], 0, 24).output) == [span("a", 0, 20, [1, 2])]
    assert plan.step(Step().cached("a", None, 20, 1).output) == []
    assert plan.step(Step().cached("a", [3], 32, 4).output) == []


def test_several_requests_in_one_step() -> None:
    plan = plan_for(("a", 7, 40), ("b", 8, 10))
    plan.step(Step().new("a", [1, 2], 0, 30).output)
    step = Step().new("b", [6], 0, 10).new("other", [9], 0, 5).cached("a", [4], 30, 10)
    step.cached("another", [3], 4, 1)
    spans = plan.step(step.output)
    assert sorted(spans, key=lambda s: s.request_id) == [
        span("a", 30, 40, [2, 4]),
        span("b", 0, 10, [6], session=8),
    ]


def test_a_step_without_any_of_its_requests() -> None:
    plan = plan_for(("a", 7, 40))
    assert plan.step(SchedulerOutput.make_empty()) == []
    assert plan.step(Step().new("x", [1], 0, 9).cached("y", None, 3, 1).output) == []
    assert plan.preempted(SchedulerOutput.make_empty()) == []


def test_preemption_is_seen_however_vllm_announces_it() -> None:
    def exported() -> ExportPlan:
        plan = plan_for(("a", 7, 40), ("b", 8, 40))
        plan.step(Step().new("a", [1, 2], 0, 20).new("b", [3, 4], 0, 20).output)
        return plan

    taken = SchedulerOutput.make_empty()
    taken.preempted_req_ids = {"a", "somebody"}
    assert exported().preempted(taken) == ["a"]

    resumed = Step().resumed("a", [5, 6], 0, 20).cached("b", None, 20, 5)
    assert exported().preempted(resumed.output) == ["a"]

    # Newer model runners get a resumed request as if it were new.
    anew = Step().new("a", [5, 6], 0, 20)
    assert exported().preempted(anew.output) == ["a"]

    going_on = Step().cached("a", [5], 20, 20).cached("b", None, 20, 5)
    assert exported().preempted(going_on.output) == []


def test_the_first_schedule_is_no_preemption() -> None:
    plan = plan_for(("a", 7, 40))
    assert plan.preempted(Step().new("a", [1, 2, 3], 16, 24).output) == []


def test_a_dropped_request_has_no_more_spans() -> None:
    plan = plan_for(("a", 7, 40))
    plan.step(Step().new("a", [1, 2], 0, 20).output)
    plan.drop("a")
    assert plan.step(Step().resumed("a", [5, 6], 0, 40).output) == []
    assert plan.preempted(Step().resumed("a", [5, 6], 0, 40).output) == []


def test_forget_says_whether_workers_know_the_request() -> None:
    plan = plan_for(("seen", 1, 40), ("dropped", 2, 40), ("unscheduled", 3, 40))
    plan.step(Step().new("seen", [1], 0, 10).new("dropped", [2], 0, 10).output)
    plan.drop("dropped")
    # Workers may still be reading the blocks of a session that has ended.
    assert plan.forget("dropped") is True
    assert plan.forget("seen") is True
    assert plan.forget("unscheduled") is False
    assert plan.forget("never heard of") is False
    assert plan.forget("seen") is False, "only once"


def test_spans_that_were_withheld_are_not_announced() -> None:
    # The session ended between its opening and this step: no worker will report the request.
    plan = plan_for(("a", 7, 40), ("b", 8, 40))
    step = Step().new("a", [1, 2], 0, 20).new("b", [3, 4], 0, 20)
    spans = plan.step(step.output, alive=lambda request_id: request_id == "b")
    assert [s.request_id for s in spans] == ["b"]
    assert plan.forget("a") is False
    assert plan.forget("b") is True


def test_block_lists_are_not_shared_with_vllm() -> None:
    blocks = [1, 2]
    plan = plan_for(("a", 7, 60))
    plan.step(Step().new("a", blocks, 0, 20).output)
    plan.step(Step().cached("a", [3], 20, 20).output)
    assert blocks == [1, 2]


def test_only_what_vllm_keeps_is_released() -> None:
    """vLLM's engine dies of a word about a request that it does not wait for."""
    plan = plan_for(("a", 1, 8), ("b", 2, 8))
    plan.step(Step().new("a", [5], 0, 8).output)
    assert plan.forget("a") and not plan.forget("b")
    assert plan.released({"a", "b", "c"}) == {"a"}
    assert plan.released({"a"}) == set()


def test_each_group_has_blocks_of_its_own() -> None:
    """Layers with a window: blocks that have left it are void, and the count goes on."""
    plan = ExportPlan([4, 8])
    plan.add("a", 7, 20)
    step = Step().new("a", [0], 0, 10)
    step.output.scheduled_new_reqs[0].block_ids = ([1, 2, 3], [4, 5])
    assert plan.step(step.output) == [
        ExportSpan(7, "a", 0, 10, 20, [[1, 2, 3], [4, 5]]),
    ]
    step = Step().cached("a", None, 10, 10)
    step.output.scheduled_cached_reqs.new_block_ids[0] = ([6, 7], [8])
    assert plan.step(step.output) == [
        ExportSpan(7, "a", 10, 20, 20, [[3, 6, 7], [5, 8]]),
    ]
