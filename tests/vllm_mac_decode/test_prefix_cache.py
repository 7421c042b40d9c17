"""A shadow's blocks are those of the next turn's request: vLLM's own hashes, however they came."""

from __future__ import annotations

import queue
from types import SimpleNamespace

import pytest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.request import Request

from vllm_mac_decode.engine.prefix_cache import EnginePrefixCache, prefix_cache

BLOCK = 4


def core(block: int = 2 * BLOCK, caching: bool = True) -> SimpleNamespace:
    """An engine core of two kinds of layers, as far as the prefix cache is concerned."""
    init_none_hash(sha256)
    blocks = [SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=n)) for n in (BLOCK, block)]
    hits = (
        [SimpleNamespace(ref_cnt=0, is_null=False)] * 2,
        [SimpleNamespace(ref_cnt=1, is_null=False)],
    )
    manager = SimpleNamespace(
        enable_caching=caching,
        coordinator=SimpleNamespace(
            hash_block_size=BLOCK, find_longest_cache_hit=lambda hashes, most: (hits, 8, 0)
        ),
        block_pool=SimpleNamespace(num_gpu_blocks=20, get_num_free_blocks=lambda: 15),
    )
    return SimpleNamespace(
        input_queue=queue.Queue(),
        request_block_hasher=get_request_block_hasher(BLOCK, sha256),
        scheduler=SimpleNamespace(
            kv_cache_manager=manager,
            kv_cache_config=SimpleNamespace(kv_cache_groups=blocks),
            block_size=BLOCK,
        ),
        vllm_config=SimpleNamespace(
            scheduler_config=SimpleNamespace(
                max_num_batched_tokens=64, long_prefill_token_threshold=0
            ),
            model_config=SimpleNamespace(max_model_len=100),
            speculative_config=None,
        ),
    )


@pytest.mark.parametrize("known", [0, 1, 3, 6])
@pytest.mark.parametrize("salt", [None, "a salt"])
def test_hashes_are_the_next_turns(known: int, salt: str | None) -> None:
    engine = core()
    tokens = list(range(1, 30))
    turn = Request(
        "next", tokens, SamplingParams(max_tokens=3), None,
        cache_salt=salt, block_hasher=engine.request_block_hasher,
    )  # fmt: skip
    assert len(turn.block_hashes) == 7
    prefixes = EnginePrefixCache(engine)
    assert (prefixes.block, prefixes.most_tokens) == (8, 64)
    assert (prefixes.longest, prefixes.slack) == (98, 0)
    drafted = prefixes.draft("x", tokens[:16], salt, turn.block_hashes[:known])
    assert drafted.block_hashes == turn.block_hashes[:4]
    assert (drafted.cache_salt, drafted.max_tokens) == (salt, 1)
    drafted.append_output_token_ids([17, 18, 19, 20])
    assert drafted.block_hashes == turn.block_hashes[:5]
    other = prefixes.draft("y", tokens[:16], "another", [])
    assert not set(other.block_hashes) & set(turn.block_hashes)


def test_what_would_be_free_beside_it() -> None:
    """Two blocks that nobody holds, 4 and 2 to be filled, one more of each group."""
    prefixes = EnginePrefixCache(core())
    drafted = prefixes.draft("x", list(range(24)), None, [])
    assert prefixes.find(drafted) == (8, (15 - 2 - (4 + 1) - (2 + 1)) / 20)


def test_queueing_and_taking_back() -> None:
    engine = core()
    prefixes = EnginePrefixCache(engine)
    drafted = prefixes.draft("x", list(range(8)), None, [])
    prefixes.queue(drafted)
    prefixes.withdraw("x")
    assert engine.input_queue.get() == (EngineCoreRequestType.ADD, (drafted, 0))
    assert engine.input_queue.get() == (EngineCoreRequestType.ABORT, ["x"])


def test_there_is_none_where_it_is_off_or_another() -> None:
    assert prefix_cache(core()) is not None
    assert prefix_cache(core(caching=False)) is None
    other = core()
    del other.scheduler.kv_cache_manager.block_pool
    assert prefix_cache(other) is None
