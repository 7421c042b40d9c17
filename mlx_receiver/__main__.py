"""``python -m mlx_receiver`` is ``mlx-receiver``."""

from mlx_receiver.cli import main

main()
