"""``mac-decode check --quality``: is a handed-off text as good as one of either engine alone?

vLLM with ``--kv-connector mac_decode`` and its receiver run already; both are asked over HTTP, as
any client asks them. docs/models.md says what the figures are.
"""
