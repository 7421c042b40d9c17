"""The half in vLLM's workers: reads K and V out of the paged cache, and sends them."""
