"""Finding, checking and loading the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mlx_receiver.decode import hub, weights
from mlx_receiver.wire.layout import (
    DTYPES,
    ITEMSIZE,
    CacheLayout,
    layout_from_config,
    text_config,
)
from mlx_receiver.wire.signature import ModelSignature, signature_from_config

if TYPE_CHECKING:
    from mlx_receiver.caches.model import ModelCache

#: Assumed where config.json does not say how long a text may be.
_DEFAULT_MAX_TOKENS: Final = 131_072

#: What configurations call how many experts a layer has.
_EXPERTS: Final = frozenset(
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
)

#: Tokens of output beside which one prompt must at least find room.
_LEAST_TOKENS: Final = 512

#: Called with what is being done, what of it is done, and how much there is to do.
Progress = Callable[[str, int, int], None]


class ModelError(Exception):
    """The model cannot be served; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model whose configuration this receiver can serve. ``path`` is its folder; one of the hub
    may still be without weights."""

    name: str
    path: Path
    config: dict[str, Any]
    signature: ModelSignature
    #: What config.json promises; the loaded model's own is ``LoadedModel.cache``.
    layout: CacheLayout
    max_tokens: int
    of_hub: bool = False

    @property
    def vllm_name(self) -> str | None:
        """What vLLM on another machine can load, None where that is not known.

        Weights that MLX has quantised are not for vLLM; their README names what they came from.
        """
        if "quantization" in self.config:
            return hub.base_model(self.path)
        return self.name if self.of_hub else hub.name_of(self.path.resolve())

    def session_bytes(self, dtype: str = "auto") -> int:
        """Bytes of K and V of the smallest session worth having."""
        return self.layout.nbytes(1 + _LEAST_TOKENS, ITEMSIZE.get(dtype, 2))


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The weights in MLX, ``nbytes`` of them, and how the model keeps its cache.

    ``local`` says why nothing is handed off to it; "" if something is. ``experts``: tokens are
    routed to some of several.
    """

    model: Any
    cache: ModelCache
    nbytes: int
    local: str = ""
    experts: bool = False

    @property
    def dtype(self) -> str:
        """Of the keys and values that it computes."""
        return self.cache.layout.kv_dtype


def find_model(name: str) -> ModelSource:
    """The model of a folder or a Hugging Face id, checked before any weight is fetched or read.

    Raises ModelError when it does not exist or cannot be served.
    """
    path, of_hub = _folder(name)
    file = path / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path} is not a model folder: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from None
    try:
        signature = signature_from_config(config)
        layout = layout_from_config(config, DTYPES[0])
    except ValueError as error:
        raise ModelError(str(error)) from None
    return ModelSource(name, path, config, signature, layout, _max_tokens(config), of_hub)


def load_model(
    source: ModelSource, dtype: str = "auto", progress: Progress | None = None
) -> LoadedModel:
    """Fetch the weights where they are missing and read them, on the thread that will decode.

    ``progress`` counts bytes, then layers. Raises ModelError when the weights do not fit the
    configuration or the memory, or are not there.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model as mlx_load

    from mlx_receiver.caches.adapter import mlx_dtype
    from mlx_receiver.caches.local import LocalCache
    from mlx_receiver.caches.model import ModelCache, UnknownCache
    from mlx_receiver.decode.latents import keep_latents
    from mlx_receiver.decode.masks import group_masks
    from mlx_receiver.decode.multipliers import multiply_keys
    from mlx_receiver.decode.rope import halve_pairs, unround_yarn
    from mlx_receiver.decode.spelling import older_spelling
    from mlx_receiver.decode.steps import unlimited_steps
    from mlx_receiver.decode.windows import as_vllm_has_them

    _check_memory(source, dtype)
    if source.of_hub:
        try:
            hub.weights(source.path, progress)
        except hub.HubError as error:
            raise ModelError(str(error)) from None
        _check_memory(source, dtype)
    try:
        changes = older_spelling(source.config)
        changes |= as_vllm_has_them(source.config) | unlimited_steps(source.config)
        model, _ = mlx_load(source.path, lazy=True, model_config=changes)
        unround_yarn(model, source.config)
        halve_pairs(model, source.config)
        multiply_keys(model, source.config)
        keep_latents(model, source.config)
        group_masks(model, source.config)
        if dtype != "auto":
            model.set_dtype(mlx_dtype(dtype))
        total = len(model.layers)
        for done, layer in enumerate(model.layers, 1):
            mx.eval(layer.parameters())
            if progress is not None:
                progress("Loading", done, total)
        mx.eval(model.parameters())
        model.eval()
        # What the model computes, not what it stores: quantised and mixed weights do not tell.
        probe = make_prompt_cache(model)
        mx.eval(model(mx.array([[0]]), cache=probe))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"loading {source.name} failed: {error}") from error
    except Exception as error:  # a configuration that lacks what mlx-lm's file of it reads
        said = f"{type(error).__name__}: {error}"
        raise ModelError(f"loading {source.name} failed: mlx-lm says {said}") from error
    local = ""
    try:
        cache = ModelCache.of(probe)
    except UnknownCache as error:
        local = str(error)
        cache = LocalCache(probe, lambda: make_prompt_cache(model))
    nbytes = sum(weight.nbytes for _, weight in tree_flatten(model.parameters()))
    return LoadedModel(model, cache, nbytes, local, _has_experts(source.config))


def _has_experts(config: dict[str, Any]) -> bool:
    counts = [value for key, value in text_config(config).items() if key in _EXPERTS]
    return any(isinstance(count, int) and count > 1 for count in counts)


def _check_memory(source: ModelSource, dtype: str) -> None:
    """Raise ModelError for weights that this machine has no room for, if they are known."""
    memory = weights.memory()
    needed = weights.weights_nbytes(source.path, dtype)
    if memory is not None and needed is not None:
        refusal = weights.refusal(source.name, needed, source.session_bytes(dtype), memory)
        if refusal is not None:
            raise ModelError(refusal)


def _folder(name: str) -> tuple[Path, bool]:
    """Where the model's description is, and whether it comes from the hub."""
    try:
        path = Path(name).expanduser()
    except RuntimeError:  # nobody's home
        raise ModelError(f"there is no folder {name}") from None
    if path.is_dir():
        return path, False
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no folder {name}")
    try:
        return hub.description(name), True
    except hub.HubError as error:
        raise ModelError(str(error)) from None


def _max_tokens(config: dict[str, Any]) -> int:
    """The model's context length in tokens; YaRN stretches the stated one."""
    c = text_config(config)
    stated = c.get("max_position_embeddings")
    if not isinstance(stated, int) or stated < 1:
        return _DEFAULT_MAX_TOKENS
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    if (rope.get("rope_type") or rope.get("type")) == "yarn":
        original = rope.get("original_max_position_embeddings") or stated
        return max(stated, int(original * float(rope.get("factor", 1.0))))
    return stated
