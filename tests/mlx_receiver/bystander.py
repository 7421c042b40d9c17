"""Someone who uses a receiver while others attack it: ``python -m ... HTTP_PORT``, until standard
input ends. Prints "quiet" once it knows what answers look like, and what it saw as JSON at the end.
"""

from __future__ import annotations

import http.client
import json
import statistics
import sys
import threading
import time

BODY = json.dumps(
    {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
)
HEADERS = {"Authorization": "Bearer sesame", "Content-Type": "application/json"}


def ask(port: int, method: str, path: str, body: str | None = None) -> str:
    """The answer on a new connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, HEADERS if body else {})
        answer = connection.getresponse()
        text = answer.read().decode()
        return text if answer.status == 200 else f"HTTP {answer.status}: {text}"
    except (OSError, http.client.HTTPException) as error:
        return repr(error)
    finally:
        connection.close()


def health(port: int, seconds: list[float]) -> str:
    """Add what a health check took; what was wrong with it, or nothing."""
    began = time.perf_counter()
    text = ask(port, "GET", "/health")
    seconds.append(time.perf_counter() - began)
    return "" if '"status":"ok"' in text else text


def complete(port: int) -> str:
    """The text of a completion, or what came instead."""
    text = ask(port, "POST", "/v1/completions", BODY)
    try:
        return str(json.loads(text)["choices"][0]["text"])
    except ValueError:
        return text


def main() -> None:
    """See the module."""
    port = int(sys.argv[1])
    quiet: list[float] = []
    seen: list[float] = []
    expected = complete(port)
    for _ in range(50):
        health(port, quiet)
    print("quiet", flush=True)
    done = threading.Event()
    wrong: list[str] = []
    answers = 0

    def completions() -> None:
        nonlocal answers
        while not done.is_set():
            if (text := complete(port)) != expected:
                wrong.append(text)
            answers += 1

    jitter: list[float] = []

    def waits() -> None:
        """How late this machine lets a thread go on that waits for nothing but the time."""
        while not done.is_set():
            began = time.perf_counter()
            time.sleep(0.005)
            jitter.append(time.perf_counter() - began - 0.005)

    def checks() -> None:
        while not done.wait(0.02) or len(seen) < 20:
            if text := health(port, seen):
                wrong.append(text)

    threads = [threading.Thread(target=work) for work in (completions, checks, waits)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    done.set()
    for thread in threads:
        thread.join()
    figures = {
        name: statistics.quantiles([*seconds, *seconds], n=20)[-1]
        for name, seconds in (("quiet", quiet), ("health", seen), ("jitter", jitter))
    }
    print(json.dumps({"wrong": wrong, "answers": answers, **figures}))


if __name__ == "__main__":
    main()
