"""The wire between vLLM and the receiver: messages, block frames, transports.

Light by design: both sides import it, so nothing here imports mlx, torch or vllm.

- ``messages``: the control channel (msgspec structs over ZeroMQ).
- ``frames``: the bulk channel's block header.
- ``signature``: the model signature that both sides compare before any KV moves.
- ``transport``: what a bulk transport must do; ``tcp`` is the built-in one.
- ``hooks``: the pluggy hooks through which transports and codecs register.
"""
