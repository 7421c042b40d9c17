"""The model signature: what must be equal, the cache's layout aside, for one engine's KV to be the
other's.

Both sides build it from the model's Hugging Face ``config.json`` (vLLM's copy went through
transformers, which moves and renames keys), so the builder normalises spellings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from mlx_receiver.wire.layout import need, text_config

_Text = Annotated[str, Meta(max_length=1024)]
_Size = Annotated[int, Meta(ge=0, le=2**31 - 1)]

#: What a rotation is called elsewhere. vLLM writes the first two into the configuration of
#: DeepSeek's models when it makes one, which the engine sees where that is in its own process (one
#: GPU); the third is an older name of Qwen's.
_ROTATIONS: Final = {
    "deepseek_yarn": "yarn", "deepseek_llama_scaling": "yarn", "mrope": "default",
}  # fmt: skip


class ModelSignature(msgspec.Struct, frozen=True):
    """What gives the numbers of a cache their meaning, quantisation of weights aside.

    ``rope`` holds the rotary parameters as sorted ``(name, value)`` pairs in text form; none where
    layers differ in them, which configurations spell in too many ways to be compared. Mistral's own
    format, which vLLM prefers for its models, has no ``model_type`` and spells rotations otherwise:
    neither is compared then. The proof tells what they would.
    """

    model_type: _Text
    hidden_size: _Size
    vocab_size: _Size
    rope: Annotated[list[tuple[_Text, _Text]], Meta(max_length=64)]

    def differences(self, other: ModelSignature) -> list[str]:
        """One "field: mine here, theirs there" line for each field that differs."""
        lines = []
        for field in self.__struct_fields__:
            mine, theirs = getattr(self, field), getattr(other, field)
            if field == "model_type" and mine.removesuffix("_text") == theirs.removesuffix("_text"):
                continue  # older configurations have no part for the language alone
            if field in ("model_type", "rope") and not (mine and theirs):
                continue
            if mine != theirs:
                lines.append(f"{field}: {_show(mine)} here, {_show(theirs)} there")
        return lines


def signature_from_config(config: Mapping[str, Any]) -> ModelSignature:
    """The signature of a Hugging Face model configuration (``config.json`` as a mapping).

    Raises ValueError naming the key when the configuration lacks one that is needed.
    """
    c = text_config(config)
    return ModelSignature(
        model_type=str(c.get("model_type", "")),
        hidden_size=need(c, "hidden_size"),
        vocab_size=need(c, "vocab_size"),
        rope=_rope(c) if c.get("model_type") else [],
    )


def _rope(c: Mapping[str, Any]) -> list[tuple[str, str]]:
    """``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling``."""
    raw = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    if "rope_local_base_freq" in c or any(isinstance(value, Mapping) for value in raw.values()):
        return []
    kind = raw.pop("rope_type", None) or raw.pop("type", None) or "default"
    raw.pop("type", None)
    kind = _ROTATIONS.get(kind, kind)
    theta = (
        raw.pop("rope_theta", None) or c.get("rope_theta") or c.get("rotary_emb_base") or 10000.0
    )
    partial = raw.pop("partial_rotary_factor", None) or _partial(c)
    parameters = {"theta": theta, "type": kind, "partial": partial}
    if kind != "default":
        parameters |= {key: value for key, value in raw.items() if value is not None}
    if "traditional" in c or "rope_traditional" in c:
        parameters["traditional"] = bool(c.get("rope_traditional", c.get("traditional")))
    return sorted((key, _number(value)) for key, value in parameters.items())


def _partial(c: Mapping[str, Any]) -> float:
    """The share of a head that is rotated. MiniMax and GPT-J say how much of it, GPT-NeoX has a
    name of its own; vLLM writes all of them into ``rope_parameters``."""
    for name in ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction"):
        if isinstance(c.get(name), int | float) and c[name]:
            return float(c[name])
    rotated, width = c.get("rotary_dim"), c.get("head_dim")
    if isinstance(rotated, int) and isinstance(width, int) and 0 < rotated <= width:
        return rotated / width
    return 1.0


def _number(value: Any) -> str:
    """A value in one spelling: 10000 and 10000.0 are the same rotary base."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return repr(float(value))


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "{" + ", ".join(f"{key}={item}" for key, item in value) + "}"
    return str(value)
