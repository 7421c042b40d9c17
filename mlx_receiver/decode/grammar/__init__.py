"""Grammars: what a text has to conform to, compiled once and followed token by token."""
