"""vLLM KV connector ``mac_decode``: prefill here, decode on a Mac."""

__version__ = "0.1.0"
