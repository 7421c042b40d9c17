"""The half in vLLM's engine: decides what is handed off, and follows it to its end."""
