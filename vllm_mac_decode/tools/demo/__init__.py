"""A demonstration of the hand-off on one machine, with a small real model."""
