"""The OpenAI-compatible HTTP API: its own clients, routers' decode requests, and the front door."""
