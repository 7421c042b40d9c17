"""What the engines are asked to continue when no text is given: of several kinds, and short.

Written for this purpose, so that no model has learned them by heart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

SHIPPED: Final = {
    "prose": (
        "The ferry left an hour late, and by the time it reached the island the shops had closed. "
        "Marta carried her bag up the narrow street, counting the doors until she found the green "
        "one. An old man opened before she could knock. He had been watching the harbour from his "
        "window, he said, and there was soup on the stove if she was hungry after the crossing. "
        "She thanked him and asked where she could hang her wet coat."
    ),
    "code": (
        "def mean(values):\n"
        '    """The average of a list of numbers."""\n'
        "    if not values:\n"
        '        raise ValueError("the list is empty")\n'
        "    return sum(values) / len(values)\n\n\n"
        "def variance(values):\n"
        '    """How far the numbers are spread around their average."""\n'
        "    middle = mean(values)\n"
        "    return sum((value - middle) ** 2 for value in values) / len(values)\n"
    ),
    "facts": (
        "Water boils at 100 degrees Celsius at sea level. The Earth turns around the Sun once a "
        "year, and the Moon around the Earth about once a month. Paris is the capital of France, "
        "and Rome is the capital of Italy. A triangle has three sides and a square has four. "
        "Iron is a metal, oxygen is a gas, and salt dissolves in water."
    ),
    "Fakten": (
        "Wasser gefriert bei null Grad Celsius. Berlin ist die Hauptstadt von Deutschland, Wien "
        "die Hauptstadt von Österreich. Ein Jahr hat zwölf Monate, und eine Woche hat sieben Tage. "
        "Die Donau fließt in das Schwarze Meer. Im Winter sind die Nächte lang und die Tage kurz."
    ),
    "table": (
        "city,country,population\nLondon,United Kingdom,8900000\nMadrid,Spain,3300000\n"
        "Vienna,Austria,2000000\nLisbon,Portugal,550000\nOslo,Norway,710000\n"
        "Athens,Greece,640000\nDublin,Ireland,590000\n"
    ),
}


def read(files: list[Path]) -> dict[str, str]:
    """The users' own, by their files' names. Raises ValueError naming what is wrong with one."""
    found = {}
    for number, file in enumerate(files, 1):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
            raise ValueError(f"--quality-text {file} cannot be read: {reason}") from None
        if not text.strip():
            raise ValueError(f"--quality-text {file} is empty")
        found[file.name if file.name not in found else f"{file.name} ({number})"] = text
    return found
