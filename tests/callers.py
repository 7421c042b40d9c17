"""A model that calls tools: a Llama whose every token says which one follows.

With tools it writes ``CALLS``, without them or after a tool's result ``ANSWER``; both engines load
it, and what it says is parsed by their own parsers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.models import SHARED, save

#: Two calls, with text before them; spaces are where they let no token be said twice.
SAYS = "I ask."
_SECOND = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
CALLS = SAYS + '<tool_call>{"name":"weather","arguments": {"days" :7}}</tool_call>' + _SECOND
CALLED = [("weather", {"days": 7}), ("clock", {})]
ANSWER = "Oslo has snow, and it stays cold!"

TEMPLATE = """\
{%- if reasoning_effort -%}
<|im_start|>system
Effort: {{ reasoning_effort }}{{ ', with thoughts' if enable_thinking }}<|im_end|>
{% endif -%}
{%- if tools -%}
<|im_start|>system
Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool_call>
{%- endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant says{{ ' then' if not tools or messages[-1].role == 'tool' }}
{%- endif -%}
"""
#: What some tokens that nothing here needs are instead: a call's markers, and a whole call.
_MARKERS = {
    "<repo_name>": "<tool_call>",
    "<reponame>": "</tool_call>",
    "<file_sep>": _SECOND,
}
#: Dimensions of the model: one for each token that it says.
_WIDTH = 256
_END = 2


def calling_llama(path: Path) -> Path:
    """Write the model, in fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
    size = {"hidden_size": _WIDTH, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**{**SHARED, **shape, **size}))
    save(model, path, "float32")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((path / "tokenizer_config.json").read_text())
    # mlx-lm's name for what vLLM calls hermes.
    config |= {"tool_parser_type": "json_tools", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    _rename_tokens(path)
    vocabulary = _vocabulary(path)
    used: set[str] = {"Ġsays", "Ġthen"}
    pairs: list[tuple[int, int]] = []
    for first, text in (("Ġsays", CALLS), ("Ġthen", ANSWER)):
        names = _distinct(text, vocabulary, used)
        used |= set(names)
        said = [vocabulary[name] for name in (first, *names)]
        pairs += zip(said, [*said[1:], _END], strict=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()  # what is said depends on the last token alone
            else:
                weight.normal_(0.0, 0.05, generator=generator)
        for place, (token, follower) in enumerate(pairs):
            direction = torch.zeros(_WIDTH)
            direction[place] = 1.0
            model.model.embed_tokens.weight[token] = direction
            model.lm_head.weight[follower] += 4.0 * direction
    model.save_pretrained(path)
    return path


def _rename_tokens(path: Path) -> None:
    file = path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    for token in tokenizer["added_tokens"]:
        if (name := _MARKERS.get(token["content"])) is not None:
            vocabulary = tokenizer["model"]["vocab"]
            vocabulary[name] = vocabulary.pop(token["content"])
            token |= {"content": name, "special": False}
    file.write_text(json.dumps(tokenizer))
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    for token in config.get("added_tokens_decoder", {}).values():
        if token["content"] in _MARKERS:
            token |= {"content": _MARKERS[token["content"]], "special": False}
    for name, value in list(config.items()):
        if isinstance(value, list):
            config[name] = [item for item in value if item not in _MARKERS]
    file.write_text(json.dumps(config))


def _vocabulary(path: Path) -> dict[str, int]:
    found: dict[str, Any] = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    return found


def _distinct(text: str, vocabulary: dict[str, int], used: set[str]) -> list[str]:
    """Tokens that make the text, each at most once and none of ``used``. Quick only where there is
    not much to choose."""
    taken: list[str] = []

    def pieces(at: int) -> list[str]:
        found = [name for name in _MARKERS.values() if text.startswith(name, at)]
        for end in range(min(len(text), at + 12), at, -1):
            name = text[at:end].replace(" ", "Ġ")
            found += [name] if name in vocabulary else []
        return found

    def search(at: int) -> bool:
        for piece in pieces(at):
            if piece in used or piece in taken:
                continue
            taken.append(piece)
            if at + len(piece) == len(text) or search(at + len(piece)):
                return True
            taken.pop()
        return False

    assert search(0), f"no distinct tokens for {text!r}"
    return taken
