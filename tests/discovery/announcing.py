"""A process that announces a receiver on the loopback, and does what it is told on stdin."""

import json
import sys

import msgspec

from mlx_receiver.discovery.announce import Announcer
from mlx_receiver.discovery.service import Announced

if __name__ == "__main__":
    announcer: Announcer | None = None
    for line in sys.stdin:
        order = json.loads(line)
        announced = msgspec.convert(order["announced"], Announced)
        if announcer is None:
            announcer = Announcer(announced, order["port"], "127.0.0.1", ttl=order["ttl"])
        else:
            announcer.update(announced)
        print("done", flush=True)
    if announcer is not None:
        announcer.close()
