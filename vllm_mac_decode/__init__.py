"""vLLM KV connector ``mac_decode``: prefill here, decode on a Mac."""

from importlib.metadata import version

__version__ = version("vllm-mac-decode")
