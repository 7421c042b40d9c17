"""What a request costs on each side, and who should do what: data and arithmetic only."""
