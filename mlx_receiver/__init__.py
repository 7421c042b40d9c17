"""MLX receiver: rebuilds a KV cache that vLLM streams to it and continues decoding."""

__version__ = "0.1.0"
