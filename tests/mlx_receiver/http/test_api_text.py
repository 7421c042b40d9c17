"""Text from tokens: characters of several tokens, special tokens, stop strings, tool calls."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from mlx_receiver.decode.model import find_model
from mlx_receiver.http.openai.text import OutputText, TextRules
from mlx_receiver.http.openai.tokenizer import Tokenizer
from mlx_receiver.http.openai.tools import ToolStream

TEXT = " Grüße aus Zürich: 你好, мир! 👩‍👩‍👧‍👦 and 🦙\n\n  indented — done."


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_path: Path) -> Tokenizer:
    return Tokenizer(find_model(str(tiny_llama_path)))


@pytest.fixture(scope="module")
def with_tools(tiny_llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same tokenizer for a model that calls tools with ``<tool_call>{...}</tool_call>``."""
    folder = tmp_path_factory.mktemp("with-tools")
    for file in tiny_llama_path.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tool_parser_type"] = "json_tools"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(find_model(str(folder)))


def pieces(tokenizer: Tokenizer, text: str, rules: TextRules) -> list[str]:
    ids = tokenizer.encode(text, special=False)
    output = OutputText(tokenizer, tokenizer.encode("A prompt"), rules)
    return [output.push([i], False, n == len(ids) - 1)[0] for n, i in enumerate(ids)]


def test_no_character_is_shown_in_part(tokenizer: Tokenizer) -> None:
    shown = pieces(tokenizer, TEXT, TextRules())
    assert "".join(shown) == TEXT, "the first word keeps its space"
    assert "\ufffd" not in "".join(shown)
    assert len([piece for piece in shown if piece]) > 20


def test_special_tokens(tokenizer: Tokenizer) -> None:
    text = "one<|im_end|>two"
    assert "".join(pieces(tokenizer, text, TextRules())) == "onetwo"
    assert "".join(pieces(tokenizer, text, TextRules(skip_special=False))) == text


def test_stop_strings_anywhere(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    ids = tokenizer.encode(TEXT, special=False)
    for _ in range(200):
        begin = rng.randrange(len(TEXT) - 1)
        stop = TEXT[begin : begin + rng.randint(1, 9)]
        expected = TEXT[: TEXT.index(stop)]
        output = OutputText(tokenizer, [1], TextRules(stop=("\0", stop)))
        shown, found = "", None
        for n, token in enumerate(ids):
            piece, found = output.push([token], False, n == len(ids) - 1)
            shown += piece
            assert expected.startswith(shown)
            if found:
                break
        assert (shown, found) == (expected, stop)


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_tool_calls_as_they_come(with_tools: Tokenizer, size: int) -> None:
    call = {"name": "weather", "arguments": {"city": "Zürich"}}
    text = f"Let me see.<tool_call>\n{json.dumps(call)}\n</tool_call>"
    text += f"<tool_call>{json.dumps(call)}</tool_call> < not a call"
    stream = ToolStream(with_tools, [])
    content, calls = "", []
    for at in range(0, len(text), size):
        more, found = stream.push(text[at : at + size], at + size >= len(text))
        content += more
        calls += found
    assert content == "Let me see. < not a call"
    assert [entry.index for entry in calls] == [0, 1]
    assert len({entry.id for entry in calls}) == 2
    for entry in calls:
        assert entry.function.name == "weather"
        assert json.loads(entry.function.arguments) == {"city": "Zürich"}


def test_what_is_no_tool_call_stays_text(with_tools: Tokenizer) -> None:
    text = "<tool_call>nonsense</tool_call>"
    assert ToolStream(with_tools, []).push(text, True) == (text, [])
    assert ToolStream(with_tools, []).push("<tool_call>{", True) == ("<tool_call>{", [])
