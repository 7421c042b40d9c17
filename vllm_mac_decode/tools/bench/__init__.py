"""``mac-decode bench``: the same request answered by vLLM alone, by the Mac alone, and together."""
