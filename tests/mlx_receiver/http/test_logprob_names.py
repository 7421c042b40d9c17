"""What log-probabilities call a token that holds a part of a character."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_receiver.decode.model import find_model
from mlx_receiver.http.openai.logprobs import Names
from mlx_receiver.http.openai.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_path: Path) -> Tokenizer:
    return Tokenizer(find_model(str(tiny_llama_path)))


def names_along(tokenizer: Tokenizer, text: str) -> list[str]:
    """What each token of the text is called where it was sampled."""
    tokens = tokenizer.encode(text)
    names = Names(tokenizer, [], as_ids=False)
    found = []
    for token in tokens:
        found.append(names.of(token))
        names.sampled(token)
    return found


@pytest.mark.parametrize("text", ["plain words", "a \U0001f9ff b", "\u4dc0\u4dc1", "x\U0001f9ffy"])
def test_a_characters_last_token_has_its_text(tokenizer: Tokenizer, text: str) -> None:
    found = names_along(tokenizer, text)
    assert "".join(found) == text
    assert "\ufffd" not in "".join(found)


def test_a_character_that_never_ends_has_none(tokenizer: Tokenizer) -> None:
    (*parts, _) = tokenizer.encode("\U0001f9ff")
    names = Names(tokenizer, [], as_ids=False)
    assert parts
    for token in parts:
        assert names.of(token) == ""
        names.sampled(token)
    (word,) = tokenizer.encode("word")
    assert names.of(word) == "word"


def test_the_tokens_before_a_part_of_the_answer_count(tokenizer: Tokenizer) -> None:
    *before, last = tokenizer.encode("a \U0001f9ff")
    assert (
        Names(tokenizer, before, as_ids=False).of(last) == " \U0001f9ff"
    )  # one of them has the space, too
    assert Names(tokenizer, before, as_ids=True).of(last) == f"token_id:{last}"
