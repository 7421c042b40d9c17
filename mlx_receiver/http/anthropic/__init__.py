"""Anthropic's Messages API, told in chat completions."""
