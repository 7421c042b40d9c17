"""The model's tokenizer: loaded when first needed, since handed-off sessions come as token ids."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from mlx_receiver.decode.model import ModelSource
from mlx_receiver.http.errors import ApiError, bad_request


class Tokenizer:
    """mlx-lm's tokenizer with vLLM's conventions. May be used from any thread."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._wrapper: Any = None
        self._names: dict[int, str] = {}

    @property
    def wrapper(self) -> Any:
        """mlx-lm's ``TokenizerWrapper``. Raises ApiError when the model has no tokenizer."""
        with self._lock:
            if self._wrapper is None:
                from mlx_lm.tokenizer_utils import load

                try:
                    self._wrapper = load(self._source.path)
                    # The first call may drop truncation settings of the file: not while others
                    # use it.
                    self._wrapper.encode("a")
                except Exception as error:
                    raise ApiError(
                        500, f"the tokenizer of {self._source.name} cannot be loaded: {error}"
                    ) from error
            return self._wrapper

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of ``text``, with the tokenizer's own BOS or the like if ``special``."""
        # Without the lock: a long text must not hold up short ones.
        return list(self.wrapper.encode(text, add_special_tokens=special))

    def decode(self, token_ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ``token_ids``."""
        return str(self.wrapper.decode(list(token_ids), skip_special_tokens=skip_special))

    def name(self, token: int) -> str:
        """Text of one token alone; log-probabilities ask for the same ones again and again."""
        found = self._names.get(token)
        if found is None:
            found = self._names[token] = self.decode([token])
        return found

    def chat(self, messages: list[dict[str, Any]], tools: Any, options: dict[str, Any]) -> str:
        """The conversation as the chat template writes it. Raises ApiError when it cannot."""
        wrapper = self.wrapper
        if not wrapper.has_chat_template:
            raise bad_request("the model has no chat template: use /v1/completions", "messages")
        try:
            text = wrapper.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        except Exception as error:
            # Templates raise whatever they like about conversations that they do not accept.
            raise bad_request(f"the chat template refuses the messages: {error}") from error
        return str(text)

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        found = self.wrapper.eos_token_id
        return None if found is None else int(found)

    @property
    def reasoning(self) -> tuple[list[int], list[int]] | None:
        """The tokens that begin the model's reasoning, and those that end it; None where mlx-lm
        knows of none."""
        wrapper = self.wrapper
        start, end = wrapper.think_start_tokens, wrapper.think_end_tokens
        return (list(start), list(end)) if start and end else None
