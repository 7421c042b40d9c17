"""OpenAI's Responses API, told in chat completions."""
