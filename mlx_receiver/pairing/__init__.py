"""Pairing: how two machines that have never met come to know each other's keys."""
