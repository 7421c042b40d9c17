"""The demo's default question: long enough that its KV takes a while to send.

Not longer, because the reference is MLX's own prefill, which takes about a quarter of a second for
each token on a CPU.
"""

DEFAULT_PROMPT = """\
Summarise the following text in two short sentences.

A large language model answers in two very different phases. In the first, called prefill, it reads
the whole prompt at once: a handful of large matrix multiplications, limited by how fast a machine
can multiply. In the second, called decode, it writes one token at a time, and for each of them it
reads all of its weights and everything that it remembers of the text from memory. Decode is limited
by how fast that memory is.

Few machines are good at both. A small workstation with a recent graphics processor may multiply
four times as fast as a desktop computer with unified memory, while that desktop reads its memory
three times as fast. Whoever owns both can give each the phase that it is good at: the workstation
reads the prompt, the desktop writes the answer, and the keys and values of the attention layers
travel between them over a network cable. They are sent layer by layer, while the layers that follow
are still being computed, so that nearly all of them have arrived when the first token is known.
"""
