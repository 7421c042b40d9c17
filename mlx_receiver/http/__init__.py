"""Health, metrics, hand-offs, and the OpenAI API."""
