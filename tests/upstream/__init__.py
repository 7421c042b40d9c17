"""vLLM's own API tests against vLLM, vLLM with the connector, and the receiver."""
