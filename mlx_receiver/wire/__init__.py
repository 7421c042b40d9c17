"""The language of vLLM's side and the receiver.

Light by design: both sides import it, so nothing here imports mlx, torch or vllm.

- ``handshake``: an envelope that every version can read.
- ``messages``: the control channel (msgspec structs over ZeroMQ), ``codec``: how they are packed
  and read, and ``trust``: which of their numbers depend on the model.
- ``frames``: the data channel's block header.
- ``signature``, ``layout``: what both sides compare before any KV moves.
- ``keys``: how peers prove that they know a secret.
- ``handoffs``: what ``/handoffs`` says.
"""
