"""The ``mac-decode`` command."""
