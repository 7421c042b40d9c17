"""vLLM's prefix cache as shadow prefill asks it, and the requests of nobody's that fill it.

Like ``adapter`` this knows vLLM's inside, of versions 0.26 to 0.33.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import DPEngineCoreProc
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.request import Request

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import SchedulerStats

logger = init_logger("vllm.mac_decode.engine")

#: The priority of a request that everybody else goes before.
LAST = 2**31 - 1


def prefix_cache(core: Any) -> EnginePrefixCache | None:
    """The engine's prefix cache, if it may be filled while the engine is idle."""
    if core.request_block_hasher is None or not core.scheduler.kv_cache_manager.enable_caching:
        reason = "vLLM's prefix caching is off"
    elif isinstance(core, DPEngineCoreProc):
        # A step of one is a step of all, and only that one knows whether it is idle.
        reason = "the engines of a data-parallel model of experts step together"
    elif any(
        isinstance(group.kv_cache_spec, MambaSpec)
        for group in core.scheduler.kv_cache_config.kv_cache_groups
    ):
        # vLLM 0.32's CPU build dies of recurrent states with prefix caching, so it was never tried.
        reason = "the model has recurrent states"
    else:
        try:
            return EnginePrefixCache(core)
        except Exception:
            logger.exception("vLLM's prefix cache is not what is known of it")
            reason = "vLLM's prefix cache cannot be read"
    logger.info("what receivers decode is not prefilled in idle time: %s", reason)
    return None


class EnginePrefixCache:
    """One engine core's prefix cache as the scheduler half's ``PrefixCache``."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self._input: queue.Queue[Any] = core.input_queue
        manager = core.scheduler.kv_cache_manager
        self._find, self._pool = manager.coordinator.find_longest_cache_hit, manager.block_pool
        groups = core.scheduler.kv_cache_config.kv_cache_groups
        self._blocks = [int(group.kv_cache_spec.block_size) for group in groups]
        self.block: int = math.lcm(core.scheduler.block_size, *self._blocks)
        # Models with several kinds of layers may hash smaller blocks than they cache.
        self._hashed: int = getattr(manager.coordinator, "hash_block_size", self.block)
        config = core.vllm_config.scheduler_config
        limits = (config.max_num_batched_tokens, config.long_prefill_token_threshold)
        self.most_tokens: int = min(limit for limit in limits if limit)
        # The prompt has a token more, and vLLM adds one to it.
        self.longest: int = core.vllm_config.model_config.max_model_len - 2
        # With speculative decoding vLLM counts one block less than it has.
        self.slack: int = self.block if core.vllm_config.speculative_config else 0

    def draft(self, as_id: str, tokens: list[int], salt: str | None, hashes: list[Any]) -> Request:
        return Request(
            request_id=as_id,
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
            pooling_params=None,
            cache_salt=salt,
            priority=LAST,
            block_hasher=_continued(
                self._core.request_block_hasher, hashes[: len(tokens) // self._hashed]
            ),
        )

    def find(self, request: Request) -> tuple[int, float]:
        tokens = len(request.prompt_token_ids or ())
        groups, cached, *_ = self._find(request.block_hashes, tokens)
        taken = sum(b.ref_cnt == 0 and not b.is_null for group in groups for b in group)
        # One more of each group: speculative decoding looks ahead.
        taken += sum(-(-(tokens - cached) // size) + 1 for size in self._blocks)
        free = self._pool.get_num_free_blocks() - taken
        return cached, free / self._pool.num_gpu_blocks

    def room(self, tokens: int, rows: int) -> float:
        taken = rows * sum(-(-tokens // size) + 1 for size in self._blocks)
        return float(self._pool.get_num_free_blocks() - taken) / self._pool.num_gpu_blocks

    def queue(self, request: Request) -> None:
        self._input.put_nowait((EngineCoreRequestType.ADD, (request, 0)))

    def withdraw(self, request_id: str) -> None:
        self._input.put_nowait((EngineCoreRequestType.ABORT, [request_id]))

    def discount(self, stats: SchedulerStats, requests: int, queries: int, hits: int) -> None:
        """Take lookups out of a step's statistics: vLLM's own, and those that it made of us."""
        for told, ours in (
            (stats.prefix_cache_stats, (requests, queries, hits)),
            (stats.connector_prefix_cache_stats, (requests, queries - hits, 0)),
        ):
            if told is not None:
                told.requests = max(0, told.requests - ours[0])
                told.queries = max(0, told.queries - ours[1])
                told.hits = max(0, told.hits - ours[2])


def _continued(
    hasher: Callable[[Request], list[Any]], known: list[Any]
) -> Callable[[Request], list[Any]]:
    """vLLM's hasher of a request's blocks, for one whose first hashes are known: they are a chain,
    whose length would make every chunk of a long conversation slow."""

    def hashes(request: Request) -> list[Any]:
        if request.block_hashes:
            return hasher(request)
        request.block_hashes.extend(known)
        more = hasher(request)
        request.block_hashes.clear()
        return [*known, *more]

    return hashes
