"""``mac-decode profile``: how fast both sides are, and how that is known."""
