"""Where a peer's message becomes trusted: what its types alone cannot say.

msgspec has checked types, ranges and lengths when a message is decoded. Two things are left:
indexes into the model's vocabulary, whose size is known only here, and numbers that are not finite,
which pass every comparison. Both are found from the message's type, so that a field that is added
later is checked without another word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import msgspec
from msgspec import inspect

from mlx_receiver.wire.messages import E_PROTOCOL, Code, WireError

#: Looks at one value: its path for messages, the value, and the vocabulary's size.
_Check = Callable[[str, Any, int], None]


def check(message: msgspec.Struct, vocab_size: int, code: Code = E_PROTOCOL) -> None:
    """Raise WireError (``code``) naming the field that is outside the vocabulary or not finite."""
    try:
        checks = _of(type(message))
        if checks is not None:
            checks("", message, vocab_size)
    except ValueError as error:
        raise WireError(code, f"{type(message).__name__}{error}") from None


def validated(message: msgspec.Struct, vocab_size: int, code: Code = E_PROTOCOL) -> None:
    """The same for a struct that was made here from a peer's values: types, ranges and lengths are
    checked, too."""
    try:
        msgspec.convert(msgspec.to_builtins(message), type(message))
    except msgspec.ValidationError as error:
        raise WireError(code, f"{type(message).__name__}: {error}") from None
    check(message, vocab_size, code)


@cache
def _of(kind: type) -> _Check | None:
    """The check of a struct; None where there is nothing to look at."""
    return _check(inspect.type_info(kind), {})


def _check(info: inspect.Type, extra: dict[str, Any]) -> _Check | None:
    match info:
        case inspect.Metadata():
            return _check(info.type, {**extra, **(info.extra or {})})
        case inspect.IntType():
            return _index if extra.get("index") == "vocabulary" else None
        case inspect.FloatType():
            return _number if extra.get("infinite") else _finite
        case inspect.StructType():
            parts = [
                (field.name, found)
                for field in info.fields
                if (found := _check(field.type, {})) is not None
            ]
            return _struct(parts) if parts else None
        case inspect.ListType() | inspect.VarTupleType():
            item = _check(info.item_type, {})
            return _items(item) if item is not None else None
        case inspect.DictType():
            key, value = _check(info.key_type, {}), _check(info.value_type, {})
            return _entries(key, value) if key is not None or value is not None else None
        case inspect.UnionType():
            members = [c for c in (_check(member, extra) for member in info.types) if c is not None]
            if len(members) > 1:
                raise TypeError(f"a union that cannot be checked: {info}")
            return _optional(members[0]) if members else None
        case _:
            return None


def _index(path: str, value: int, vocab_size: int) -> None:
    if not 0 <= value < vocab_size:
        raise ValueError(f"{path} is {value}, not below the vocabulary's size of {vocab_size}")


def _finite(path: str, value: float, _vocab_size: int) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{path} is {value}, not a finite number")


def _number(path: str, value: float, _vocab_size: int) -> None:
    if math.isnan(value):
        raise ValueError(f"{path} is {value}, not a number")


def _struct(parts: list[tuple[str, _Check]]) -> _Check:
    def check_struct(path: str, value: Any, vocab_size: int) -> None:
        for name, check_part in parts:
            check_part(f"{path}.{name}", getattr(value, name), vocab_size)

    return check_struct


def _items(check_item: _Check) -> _Check:
    def check_items(path: str, values: Iterable[Any], vocab_size: int) -> None:
        if check_item is _index:
            # A prompt has a million of them: at C's speed.
            items = values if isinstance(values, list) else list(values)
            if items and (min(items) < 0 or max(items) >= vocab_size):
                worst = min(items) if min(items) < 0 else max(items)
                check_item(f"{path}[{items.index(worst)}]", worst, vocab_size)
            return
        for index, item in enumerate(values):
            check_item(f"{path}[{index}]", item, vocab_size)

    return check_items


def _entries(check_key: _Check | None, check_value: _Check | None) -> _Check:
    def check_entries(path: str, values: dict[Any, Any], vocab_size: int) -> None:
        for key, value in values.items():
            if check_key is not None:
                check_key(f"{path} key", key, vocab_size)
            if check_value is not None:
                check_value(f"{path}[{key}]", value, vocab_size)

    return check_entries


def _optional(check_member: _Check) -> _Check:
    def check_optional(path: str, value: Any, vocab_size: int) -> None:
        if value is not None:
            check_member(path, value, vocab_size)

    return check_optional


def within_depth(values: list[Any], most: int) -> bool:
    """Whether no dict or list in ``values``, which hold JSON, lies more than ``most`` deep."""
    level: list[Any] = [values]
    for _ in range(most):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return True
    return False
