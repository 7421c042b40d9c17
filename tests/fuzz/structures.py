"""Values shaped like a struct: right ones, and each of them with one thing wrong.

Everything follows from the types (``msgspec.inspect``): a field that is added is fuzzed, too.
Hypothesis draws the right ones; of each, ``variants`` makes some hundred that have one field at,
beyond or outside its range, of another type, missing, or unknown.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st
from msgspec import inspect

#: Vocabulary of the fuzzed model: small, so that indexes beyond it are common.
VOCABULARY = 100

Raw = st.SearchStrategy[Any]

_NUMBERS = (-1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63))
_FLOATS = (0.0, -0.0, -1e-9, 1.0, 1.0000001, -1.0, 1e-300, 1e308, -1e308, math.inf, -math.inf,
           math.nan, 2.0, 100.1)  # fmt: skip
#: What no field of another type may be.
_STRANGERS: tuple[Any, ...] = (
    None, True, 3, 2.5, "", "x", b"", b"\xff", [], [[]], [[[[]]]], {}, {"": {}}, [None], [-1],
    [2.5],
)  # fmt: skip


def right(kind: Any) -> Raw:
    """Builtins, as a peer would encode them, for a value of this type that is in all its ranges."""
    return _right(inspect.type_info(kind), {})


def _right(info: inspect.Type, extra: dict[str, Any]) -> Raw:
    match info:
        case inspect.Metadata():
            return _right(info.type, {**extra, **(info.extra or {})})
        case inspect.StructType():
            return _struct(info)
        case inspect.UnionType():
            return st.one_of([_right(member, extra) for member in info.types])
        case inspect.IntType():
            low, high = _bounds(info)
            if extra.get("index") == "vocabulary":
                high = min(high, VOCABULARY - 1)
            return st.integers(max(low, 0), min(high, 40))
        case inspect.FloatType():
            low = 0.5 if info.gt is not None else info.ge
            return st.floats(-5 if low is None else low, min(info.le or 1, 1))
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.StrType():
            return st.text(min_size=info.min_length or 0, max_size=4)
        case inspect.BytesType():
            return st.just(bytes(info.min_length or 4))
        case inspect.LiteralType():
            return st.sampled_from(list(info.values))
        case inspect.ListType():
            return st.lists(_right(info.item_type, {}), min_size=info.min_length or 0, max_size=3)
        case inspect.TupleType():
            return st.tuples(*[_right(item, {}) for item in info.item_types]).map(list)
        case inspect.DictType():
            return st.dictionaries(
                _right(info.key_type, {}), _right(info.value_type, {}), max_size=2
            )
        case _:
            return st.sampled_from([None, 1, "x", []])


def _struct(info: inspect.StructType) -> Raw:
    fields = [(field.encode_name, _right(field.type, {})) for field in info.fields]

    def make(values: tuple[Any, ...]) -> Any:
        if info.array_like:
            return list(values)
        tag = {info.tag_field or "type": info.tag} if info.tag is not None else {}
        return tag | {name: value for (name, _), value in zip(fields, values, strict=True)}

    return st.tuples(*[value for _, value in fields]).map(make)


def variants(kind: Any, value: Any) -> Iterator[Any]:
    """The value with one fault, or one value at the edge of its range, in every place."""
    yield value
    info = inspect.type_info(kind)
    for path, part in _places(info, {}, value, ()):
        for other in _others(part, _at(value, path)):
            yield _with(value, path, lambda _, other=other: other)
    for path, _ in _places(info, {}, value, ()):
        if isinstance(_at(value, path), dict):
            for key in list(_at(value, path)):
                yield _with(
                    value, path, lambda at, key=key: {k: v for k, v in at.items() if k != key}
                )
            yield _with(value, path, lambda at: at | {"unknown": [[1]]})
        elif isinstance(_at(value, path), list):
            yield _with(value, path, lambda at: at[:-1])
            yield _with(value, path, lambda at: [*at, *at[-1:]])


_Place = tuple[tuple[Any, ...], tuple[inspect.Type, dict[str, Any]]]


def _places(
    info: inspect.Type, extra: dict[str, Any], value: Any, path: tuple[Any, ...]
) -> Iterator[_Place]:
    """Every part of the value with its type."""
    if isinstance(info, inspect.Metadata):
        yield from _places(info.type, {**extra, **(info.extra or {})}, value, path)
        return
    if isinstance(info, inspect.UnionType):
        fitting = [m for m in info.types if isinstance(m, inspect.NoneType) == (value is None)]
        yield from _places(fitting[0] if fitting else info.types[0], extra, value, path)
        return
    yield path, (info, extra)
    if isinstance(info, inspect.StructType):
        for index, field in enumerate(info.fields):
            key: Any = index if info.array_like else field.encode_name
            yield from _places(field.type, {}, value[key], (*path, key))
    elif isinstance(info, inspect.ListType):
        for index, item in enumerate(value[:1]):  # the others are like it
            yield from _places(info.item_type, {}, item, (*path, index))
    elif isinstance(info, inspect.DictType):
        for key in list(value)[:1]:
            yield from _places(info.value_type, {}, value[key], (*path, key))


def _others(part: tuple[inspect.Type, dict[str, Any]], value: Any) -> Iterator[Any]:
    info, extra = part
    yield from _STRANGERS
    if isinstance(info, inspect.IntType):
        low, high = _bounds(info)
        near = {bound + step for bound in (low, high) for step in (-1, 0, 1)} | set(_NUMBERS)
        if extra.get("index") == "vocabulary":
            near |= {VOCABULARY - 1, VOCABULARY, 10**9}
        yield from (number for number in sorted(near) if -(2**63) <= number < 2**64)
    elif isinstance(info, inspect.FloatType):
        yield from _FLOATS
    elif isinstance(info, inspect.StrType | inspect.BytesType):
        for length in {0, 1, 33, info.min_length or 0, info.max_length or 0}:
            for size in (length, length + 1):
                yield "x" * size if isinstance(info, inspect.StrType) else bytes(size)
    elif isinstance(info, inspect.ListType) and value:
        for length in (info.max_length or 300, (info.max_length or 300) + 1):
            if length <= 5000:
                yield [value[0]] * length
    elif isinstance(info, inspect.DictType) and value:
        key, item = next(iter(value.items()))
        if isinstance(key, int):
            yield from ({other: item} for other in (-1, VOCABULARY - 1, VOCABULARY, 2**31, 2**63))


def _bounds(info: inspect.IntType) -> tuple[int, int]:
    low = -(2**63) if info.ge is None else info.ge
    return low, 2**63 - 1 if info.le is None else info.le


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _with(value: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """A copy of the value with one part changed."""
    if not path:
        return change(value)
    made = copy.copy(value)
    made[path[0]] = _with(value[path[0]], path[1:], change)
    return made
