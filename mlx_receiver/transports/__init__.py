"""The data channel: how blocks travel from a vLLM worker into the receiver's memory."""
