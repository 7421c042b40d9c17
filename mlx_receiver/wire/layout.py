"""The cache layout: what one model's KV cache consists of, layer by layer, as data.

Each side derives its own from what its engine has really allocated, Hello carries vLLM's, and the
receiver compares. Frames and coverage know layers, parts and ranges only; what a part is for, the
cache kinds know (``caches``) and the probe on vLLM's side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

#: Numbers of a cache as they travel. The index is the dtype's code in a frame.
DTYPES: Final = ("bfloat16", "float16", "float32", "float8_e4m3", "float8_e5m2", "int8")
ITEMSIZE: Final = {
    "bfloat16": 2, "float16": 2, "float32": 4, "float8_e4m3": 1, "float8_e5m2": 1,
    "int8": 1,
}  # fmt: skip

_Dtype = Literal["bfloat16", "float16", "float32", "float8_e4m3", "float8_e5m2", "int8"]

#: The kind whose layers hold K and V of every token, the one of the last tokens only, the one of
#: those in the last token's chunk, and the one that holds states of the whole text.
FULL: Final = "full"
WINDOW: Final = "window"
CHUNK: Final = "chunk"
RECURRENT: Final = "recurrent"
KEYS: Final = "keys"
VALUES: Final = "values"

_Name = Annotated[str, Meta(min_length=1, max_length=64)]
_Count = Annotated[int, Meta(ge=1, le=1 << 20)]

#: Parts of a layer, of which a frame names one by its index.
MAX_PARTS: Final = 16


class Held(msgspec.Struct, frozen=True):
    """What the receiver has of a prompt's cache before anything arrives: the rows of its first
    ``tokens``, of parts that keep every token, and if ``bounded`` of those that keep the last ones
    only. States of the whole text always travel."""

    tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    bounded: bool = False


#: Nothing of it.
NOTHING: Final = Held()


class Part(msgspec.Struct, frozen=True):
    """One array of a layer's cache: ``[heads, tokens, width]``, or ``[heads, rows, width]`` where
    ``by_token`` is false and it describes the whole text (the state of a recurrent layer).

    ``dtype`` is that of the numbers that travel, and stand for ``scale`` times as much (in a cache
    of 8-bit floats). Of a part with a ``window`` only the last so many tokens of a prompt are kept,
    and travel; of one with a ``chunk`` those behind the last multiple of it. ``dims``: what a row
    of ``width`` numbers is an array of, if not simply that.
    """

    name: _Name
    heads: _Count
    width: _Count
    dtype: _Dtype
    by_token: bool = True
    window: _Count | None = None
    dims: Annotated[list[_Count], Meta(max_length=4)] = []
    scale: Annotated[float, Meta(gt=0, le=1e30)] = 1.0
    rows: _Count = 1
    chunk: _Count | None = None

    @property
    def row(self) -> int:
        """Numbers of one token, or of one row of all heads where it is not by token."""
        return self.heads * self.width

    def tokens(self, prompt_tokens: int) -> int:
        """Rows of each head that a prompt has."""
        return prompt_tokens - self.first(prompt_tokens) if self.by_token else self.rows

    def first(self, prompt_tokens: int) -> int:
        """The token of the first of those rows."""
        if not self.by_token:
            return 0
        if self.chunk is not None:
            return (prompt_tokens - 1) // self.chunk * self.chunk
        return max(0, prompt_tokens - (self.window or prompt_tokens))

    @property
    def bounded(self) -> bool:
        """Whether it keeps the last tokens only."""
        return self.window is not None or self.chunk is not None

    def start(self, prompt_tokens: int, held: Held) -> int:
        """The first token that travels of a prompt of so many; ``prompt_tokens`` if none does."""
        first = self.first(prompt_tokens)
        if not self.by_token or (self.bounded and not held.bounded):
            return first
        return max(first, min(held.tokens, prompt_tokens))

    def travels(self, prompt_tokens: int, held: Held) -> int:
        """Rows of each head that travel."""
        if not self.by_token:
            return self.rows
        return prompt_tokens - self.start(prompt_tokens, held)


class LayerLayout(msgspec.Struct, frozen=True):
    """One layer's cache: its ``kind`` says what the parts mean."""

    kind: _Name
    parts: Annotated[list[Part], Meta(min_length=1, max_length=MAX_PARTS)]


class CacheLayout(msgspec.Struct, frozen=True):
    """Every layer of a model, in order."""

    layers: Annotated[list[LayerLayout], Meta(min_length=1, max_length=4096)]

    @property
    def kv_dtype(self) -> str:
        """The parts' dtype; the narrowest one where they differ."""
        dtypes = [part.dtype for layer in self.layers for part in layer.parts]
        return min(dtypes, key=ITEMSIZE.__getitem__)

    @property
    def itemsize(self) -> int:
        """Bytes of the widest number that travels."""
        return max(ITEMSIZE[part.dtype] for layer in self.layers for part in layer.parts)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that each token of a prompt adds, while no window is full."""
        return self.nbytes(2) - self.nbytes(1)

    def nbytes(self, prompt_tokens: int, itemsize: int | None = None, held: Held = NOTHING) -> int:
        """Bytes of a prompt's cache beside what is ``held``, as it travels or with numbers of
        ``itemsize`` bytes."""
        return sum(
            part.travels(prompt_tokens, held) * part.row * (itemsize or ITEMSIZE[part.dtype])
            for layer in self.layers
            for part in layer.parts
        )

    def kept_alike(self, tokens: int, more_tokens: int) -> bool:
        """Whether what parts that keep the last tokens have of a text of ``tokens`` reaches back
        as far as what they need of one of ``more_tokens`` that begins alike."""
        return all(
            part.first(tokens) <= part.first(more_tokens)
            for layer in self.layers
            for part in layer.parts
            if part.bounded
        )

    def cells(self, prompt_tokens: int, held: Held = NOTHING) -> int:
        """Rows of all parts' heads that travel: what coverage has a mark for."""
        return sum(
            part.heads * part.travels(prompt_tokens, held)
            for layer in self.layers
            for part in layer.parts
        )

    @property
    def every_token(self) -> bool:
        """Whether each part keeps a row of every token: such a cache can be computed from the front
        while it arrives from the end."""
        return all(
            part.by_token and not part.bounded for layer in self.layers for part in layer.parts
        )

    def limit(self, other: CacheLayout) -> int | None:
        """The longest text of which both caches hold the same, None if there is no end to that:
        where the other side's attention has a window or chunks, and this side's has none."""
        windows = [
            part.window or part.chunk
            for mine, theirs in zip(self.layers, other.layers, strict=False)
            if mine.kind == FULL and theirs.kind in (WINDOW, CHUNK)
            for part in theirs.parts
        ]
        return min(filter(None, windows), default=None)

    def differences(self, other: CacheLayout) -> list[str]:
        """What differs, one "layers, part: field: mine here, theirs there" line for each.

        A part's dtype is not compared: the receiver converts what arrives. Nor is a window that
        this side does not know: see ``limit``.
        """
        lines = []
        if len(self.layers) != len(other.layers):
            lines = [f"layers: {len(self.layers)} here, {len(other.layers)} there"]
        found: dict[str, list[int]] = {}
        for index, (mine, theirs) in enumerate(zip(self.layers, other.layers, strict=False)):
            for line in _layer_differences(mine, theirs):
                found.setdefault(line, []).append(index)
        return lines + [f"{_layers(indexes)}, {line}" for line, indexes in found.items()]


def full_attention(layers: int, heads: int, width: int, dtype: str) -> CacheLayout:
    """Layers that all keep K and V of every token. Raises ValueError for numbers that no model
    has."""
    parts = [{"name": name, "heads": heads, "width": width, "dtype": dtype}
             for name in (KEYS, VALUES)]  # fmt: skip
    try:
        return msgspec.convert(
            {"layers": [{"kind": FULL, "parts": parts}] * min(layers, 1 << 13)}, CacheLayout
        )
    except msgspec.ValidationError as error:
        raise ValueError(f"no cache has that shape: {error}") from None


def checked(layer: LayerLayout) -> LayerLayout:
    """The layer, made by whoever it may be, if it can travel. Raises ValueError saying what is
    wrong with it."""
    try:
        msgspec.convert(msgspec.to_builtins(layer), LayerLayout)
    except (msgspec.ValidationError, TypeError) as error:
        raise ValueError(f"no layer has that form: {error}") from None
    names = [part.name for part in layer.parts]
    if "+" in layer.kind or len(set(names)) < len(names):
        raise ValueError(f"a kind has no '+' and no two parts of a name: {layer.kind}, {names}")
    return layer


def windowed(layer: LayerLayout, window: int) -> LayerLayout:
    """A layer of plain K and V that keeps the last ``window`` tokens only."""
    parts = [msgspec.structs.replace(part, window=window) for part in layer.parts]
    return LayerLayout(WINDOW, parts)


def chunked(layer: LayerLayout, chunk: int) -> LayerLayout:
    """A layer of plain K and V whose tokens attend to their own ``chunk`` of the text only."""
    return LayerLayout(CHUNK, [msgspec.structs.replace(part, chunk=chunk) for part in layer.parts])


def beside(caches: Sequence[LayerLayout]) -> LayerLayout:
    """A layer that keeps several caches: the kinds joined by "+", each one's parts under its
    number."""
    parts = [
        msgspec.structs.replace(part, name=f"{number}.{part.name}")
        for number, cache in enumerate(caches)
        for part in cache.parts
    ]
    return LayerLayout("+".join(cache.kind for cache in caches), parts)


def sides(layer: LayerLayout) -> list[LayerLayout]:
    """The caches that ``beside`` put together."""
    found: dict[str, list[Part]] = {}
    for part in layer.parts:
        number, _, name = part.name.partition(".")
        found.setdefault(number, []).append(msgspec.structs.replace(part, name=name))
    return [
        LayerLayout(kind, parts)
        for kind, parts in zip(layer.kind.split("+"), found.values(), strict=True)
    ]


def layout_from_config(config: Mapping[str, Any], dtype: str) -> CacheLayout:
    """The layout that a model of K and V will have, by its ``config.json``: for estimates
    and checks where no engine has allocated anything yet.

    Raises ValueError naming the key when the configuration lacks one that is needed.
    """
    c = text_config(config)
    heads = need(c, "num_attention_heads")
    whole = full_attention(
        _layer_count(c),
        c.get("num_key_value_heads") or heads,
        c.get("head_dim") or need(c, "hidden_size") // heads,
        dtype,
    )
    kinds, window = c.get("layer_types"), c.get("sliding_window")
    if not isinstance(kinds, Sequence) or not isinstance(window, int) or window < 1:
        return whole
    layers = list(whole.layers)
    for index, (kind, layer) in enumerate(zip(kinds, whole.layers, strict=False)):
        if kind == "sliding_attention":
            layers[index] = windowed(layer, window)
    return CacheLayout(layers)


#: What configurations say of layers that keep something else than K and V, or share them.
_OTHERS: Final = (
    "kv_lora_rank", "num_kv_shared_layers", "attention_chunk_size", "hybrid_override_pattern",
    "layers_block_type", "mamba_d_state", "ssm_state_size", "conv_L_cache", "attn_layer_period",
)  # fmt: skip


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether ``layout_from_config`` is what an engine will allocate, as far as one can tell."""
    c = text_config(config)
    kinds = c.get("layer_types")
    attention = ("full_attention", "sliding_attention")
    mixed = isinstance(kinds, list) and any(kind not in attention for kind in kinds)
    return not mixed and not any(c.get(key) for key in _OTHERS)


def _layer_count(c: Mapping[str, Any]) -> int:
    """Hybrid models may spell each layer's kind, and no number."""
    for key in ("layers_block_type", "layer_types", "hybrid_override_pattern"):
        if "num_hidden_layers" not in c and isinstance(c.get(key), (str, list)):
            return len(c[key])
    return need(c, "num_hidden_layers")


#: What Gemma 3's published models that also see leave to the defaults of transformers' class.
_GEMMA3: Final = {
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131_072, "tie_word_embeddings": True,
}  # fmt: skip


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model's configuration with that of its language part on top."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    unsaid = _GEMMA3 if text.get("model_type") == "gemma3_text" else {}
    return {**unsaid, **config, **text}


def need(config: Mapping[str, Any], key: str) -> int:
    """A number of the configuration. Raises ValueError where there is none."""
    value = config.get(key)
    if not isinstance(value, int):
        raise ValueError(f"the model's config.json has no usable {key!r}: {value!r}")
    return value


def _layer_differences(mine: LayerLayout, theirs: LayerLayout) -> list[str]:
    fields = ["heads", "width", "by_token", "window", "chunk", "dims", "rows"]
    if mine.kind == FULL and theirs.kind in (WINDOW, CHUNK):
        fields = [field for field in fields if field not in ("window", "chunk")]
        for part in theirs.parts:
            has = (part.window is not None, part.chunk is not None)
            if has != (theirs.kind == WINDOW, theirs.kind == CHUNK):
                return [f"{part.name}: window and chunk do not fit the kind {theirs.kind}"]
    elif mine.kind != theirs.kind:
        return [f"kind: {mine.kind} here, {theirs.kind} there"]
    names = [[part.name for part in layer.parts] for layer in (mine, theirs)]
    if names[0] != names[1]:
        return [f"parts: {', '.join(names[0])} here, {', '.join(names[1])} there"]
    return [
        f"{a.name}: {field}: {getattr(a, field)} here, {getattr(b, field)} there"
        for a, b in zip(mine.parts, theirs.parts, strict=True)
        for field in fields
        if getattr(a, field) != getattr(b, field)
    ]


def _layers(indexes: Sequence[int]) -> str:
    """``layer 3`` or ``layers 0..31``, ``layers 0, 2, 5``."""
    if len(indexes) == 1:
        return f"layer {indexes[0]}"
    if indexes[-1] - indexes[0] == len(indexes) - 1:
        return f"layers {indexes[0]}..{indexes[-1]}"
    return f"layers {', '.join(map(str, indexes))}"


def _without_counts(layer: LayerLayout) -> LayerLayout:
    parts = [msgspec.structs.replace(part, heads=1, rows=1) for part in layer.parts]
    return LayerLayout(layer.kind, parts)


def merged(pieces: Sequence[Mapping[int, LayerLayout]]) -> CacheLayout:
    """The whole model's layout from what each worker holds, by the layer's place in the model.

    A worker that holds heads 4 to 7 of a part says that it has 8, and so with rows. Raises
    ValueError when a layer is missing, or when workers say different things of it.
    """
    layers: dict[int, LayerLayout] = {}
    for piece in pieces:
        for index, layer in piece.items():
            other = layers.setdefault(index, layer)
            if _without_counts(other) != _without_counts(layer):
                raise ValueError(f"{_layers([index])} is not the same in every worker")
            parts = [
                max(pair, key=lambda part: (part.heads, part.rows))
                for pair in zip(other.parts, layer.parts, strict=True)
            ]
            layers[index] = LayerLayout(layer.kind, parts)
    missing = [index for index in range(max(layers, default=0) + 1) if index not in layers]
    if missing:
        raise ValueError(f"no worker holds {_layers(missing)}")
    return CacheLayout([layers[index] for index in sorted(layers)])
