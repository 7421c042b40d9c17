"""Asking a receiver for the hand-offs that it remembers."""

from __future__ import annotations

import msgspec

from vllm_mac_decode.tools.receiver_http import HttpError, NoAnswer, get
from vllm_mac_decode.tools.timeline import TimelineError

LATEST = "latest"


class _Listed(msgspec.Struct):
    request_id: str


def fetch(receiver_http: str, request: str = LATEST, api_key: str = "") -> bytes:
    """The receiver's JSON account of one request: by its id or the beginning of it, or the latest.

    Responses carry the id without the suffix that vLLM appends to it, so a beginning is enough.
    Raises TimelineError saying what is wrong when there is none.
    """
    base = receiver_http.rstrip("/")
    try:
        known = [one.request_id for one in get(base, "/handoffs", list[_Listed], api_key)]
        wanted = [k for k in known if request == LATEST or k.startswith(request)]
        if wanted:
            return bytes(get(base, f"/handoffs/{wanted[-1]}", msgspec.Raw, api_key))
    except NoAnswer as error:
        raise TimelineError(
            f"{error}: is `mlx-receiver start` running there, and is this its --http-port?"
        ) from None
    except HttpError as error:
        raise TimelineError(str(error)) from None
    if not known:
        raise TimelineError(
            f"the receiver at {base} remembers no hand-off: send a request first. Why some stay in "
            "vLLM, its metric vllm:mac_decode_local_total says"
        )
    raise TimelineError(
        f"the receiver at {base} does not remember {request}; it has: {', '.join(known)}"
    )
