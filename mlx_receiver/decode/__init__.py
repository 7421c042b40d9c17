"""The thread that decodes, and everything of mlx-lm that is touched."""
