"""MLX receiver: rebuilds a KV cache that vLLM streams to it and continues decoding."""

from importlib.metadata import version

__version__ = version("vllm-mac-decode")
