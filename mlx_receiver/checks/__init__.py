"""``mlx-receiver check``: does this machine decode rightly, and can the other one reach it?

``machine`` looks at the system, ``decoding`` and ``transfer`` at MLX; these two run in a process of
their own (``child``), so that a library that aborts becomes a finding too. ``report`` puts them in
order and says them.
"""
