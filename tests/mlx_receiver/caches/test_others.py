"""Other packages' adapters: the first that knows a cache has it, and one that fails is named."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from mlx_receiver import plugins
from mlx_receiver.caches.model import ModelCache, adapters
from mlx_receiver.caches.plain import PlainKV
from mlx_receiver.wire.layout import FULL, LayerLayout, Part


class Named(PlainKV):
    """K and V under another name, or whatever it is told to say."""

    kind = "named"

    def __init__(self, answer: Any = None) -> None:
        self._answer = answer

    def layout(self, cache: Any) -> LayerLayout | None:
        if isinstance(self._answer, Exception):
            raise self._answer
        plain = super().layout(cache)
        return self._answer or (plain and LayerLayout(self.kind, plain.parts))


@pytest.fixture
def install(request: pytest.FixtureRequest) -> Any:
    def register(*others: Any) -> None:
        class Plugin:
            @plugins.hookimpl
            def mac_decode_cache_adapters(self) -> list[Any]:
                return list(others)

        plugins.manager().register(Plugin(), "others")
        request.addfinalizer(lambda: plugins.manager().unregister(name="others"))

    return register


def filled() -> KVCache:
    cache = KVCache()
    cache.update_and_fetch(mx.zeros((1, 2, 1, 8)), mx.zeros((1, 2, 1, 8)))
    return cache


def test_another_package_is_asked_first(install: Any) -> None:
    install(Named())
    assert [adapter.kind for adapter in adapters()][:2] == ["named", FULL]
    layout = ModelCache.of([filled()]).layout
    assert [layer.kind for layer in layout.layers] == ["named"]
    # And of two with the same name the first builds it.
    other = Named()
    assert ModelCache(layout, [other, Named()])._adapters == [other]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (ValueError("no"), "ValueError: no"),
        (LayerLayout("a+b", [Part("x", 1, 1, "int8")]), "ValueError: a kind has no '+'"),
        (LayerLayout("x", []), "ValueError: no layer has that form"),
        ("something", "Expected `object`, got `str`"),
    ],
)
def test_one_that_fails_is_passed_over(
    answer: Any, said: str, install: Any, caplog: pytest.LogCaptureFixture
) -> None:
    install(Named(answer))
    assert ModelCache.of([filled(), filled()]).layout.layers[1].kind == FULL
    (record,) = caplog.records
    assert "test_others.Named cannot say what a cache holds and is left out: " in record.message
    assert said in record.message
