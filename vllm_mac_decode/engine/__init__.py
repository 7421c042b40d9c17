"""What is patched in vLLM, and every difference between its versions."""
