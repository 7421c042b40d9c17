"""The control channel: clients, and who they are."""
