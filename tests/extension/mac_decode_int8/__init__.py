"""K and V travel as 8-bit integers, each token's of each head with a scale."""

from mlx_receiver.plugins import hookimpl

KIND = "int8"


@hookimpl
def mac_decode_paged_caches():
    """Asked in vLLM's workers."""
    from mac_decode_int8.paged import Int8Adapter

    return [Int8Adapter()]


@hookimpl
def mac_decode_cache_adapters():
    """Asked on the receiver."""
    from mac_decode_int8.landed import Int8KV

    return [Int8KV()]
