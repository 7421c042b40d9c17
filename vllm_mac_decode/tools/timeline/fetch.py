"""Asking a receiver for the hand-offs that it remembers."""

from __future__ import annotations

import httpx

from vllm_mac_decode.tools.timeline import TimelineError

LATEST = "latest"


def client(api_key: str = "", seconds: float = 10) -> httpx.Client:
    """A client for machines of one's own: no proxy of the environment comes in between."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(timeout=seconds, headers=headers, trust_env=False)


def fetch(receiver_http: str, request: str = LATEST, api_key: str = "") -> bytes:
    """The receiver's JSON account of one request: by its id or the beginning of it, or the latest.

    Responses carry the id without the suffix that vLLM appends to it, so a beginning is enough.
    Raises TimelineError saying what is wrong when there is none.
    """
    base = receiver_http.rstrip("/")
    try:
        with client(api_key) as http:
            listed = http.get(f"{base}/handoffs")
            if listed.status_code == httpx.codes.UNAUTHORIZED:
                raise TimelineError(
                    f"{base} wants a key: --api-key or MLX_RECEIVER_API_KEY with the receiver's own"
                )
            known = [str(e["request_id"]) for e in listed.json()]
            wanted = [k for k in known if request == LATEST or k.startswith(request)]
            if wanted:
                answer = http.get(f"{base}/handoffs/{wanted[-1]}")
                return answer.raise_for_status().content
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise TimelineError(
            f"no receiver answers at {base} ({error}): is `mlx-receiver start` running there, "
            "and is this its --http-port?"
        ) from None
    except TimelineError:
        raise
    except (ValueError, TypeError, KeyError):
        raise TimelineError(f"{base} is not a receiver's HTTP address") from None
    if not known:
        raise TimelineError(f"the receiver at {base} remembers no hand-off: send a request first")
    raise TimelineError(
        f"the receiver at {base} does not remember {request}; it has: {', '.join(known)}"
    )
