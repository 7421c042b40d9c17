"""``vllm.general_plugins``: runs in every vLLM process, before the command line is parsed."""


def register() -> None:
    """Register the connector and the ``--kv-connector`` flag. Safe to call more than once."""
    from vllm_mac_decode.registration import register_all

    register_all()
