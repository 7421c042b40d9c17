"""The tables of settings in docs/operation.md, from the classes that declare them.

python .ci/options.py            # exit status 1 when they are out of date
python .ci/options.py --write
"""

from __future__ import annotations

import sys
from pathlib import Path

from mlx_receiver.options import table
from mlx_receiver.settings import ENV_PREFIX
from mlx_receiver.settings import Settings as ReceiverSettings
from vllm_mac_decode.settings import ENV_PREFIX as CONNECTOR_PREFIX
from vllm_mac_decode.settings import Settings as ConnectorSettings

DOCUMENT = Path(__file__).parent.parent / "docs" / "operation.md"


def main() -> int:
    """Compare, or write."""
    text = DOCUMENT.read_text()
    tables = {
        "vllm": table(ConnectorSettings, CONNECTOR_PREFIX, flags=False),
        "receiver": table(ReceiverSettings, ENV_PREFIX, flags=True),
    }
    wanted = text
    for name, made in tables.items():
        begin, end = (f"<!-- {name} settings: {edge} -->\n" for edge in ("begin", "end"))
        head, _, rest = wanted.partition(begin)
        _, _, tail = rest.partition(end)
        wanted = f"{head}{begin}{made}\n{end}{tail}"
    if "--write" in sys.argv:
        DOCUMENT.write_text(wanted)
    elif wanted != text:
        print(f"{DOCUMENT.name} does not have today's settings: python {sys.argv[0]} --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
