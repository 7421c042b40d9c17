"""Finding, checking and loading the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mlx_receiver.wire import hooks
from mlx_receiver.wire.signature import ModelSignature, signature_from_config

if TYPE_CHECKING:
    from mlx_receiver.cache import CacheAdapter

#: What ``--dtype`` takes; ``auto`` leaves the weights as they are stored.
DTYPE_CHOICES: Final = ("auto", "bfloat16", "float16", "float32")

#: Assumed where config.json does not say how long a text may be.
_DEFAULT_MAX_TOKENS: Final = 131_072

#: Called with what is being done, what of it is done, and how much there is to do.
Progress = Callable[[str, int, int], None]


class ModelError(Exception):
    """The model cannot be served; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on disk whose configuration this receiver can serve."""

    name: str
    path: Path
    config: dict[str, Any]
    signature: ModelSignature
    adapter: CacheAdapter
    max_tokens: int


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The weights in MLX. ``dtype`` is that of the keys and values that the model computes."""

    model: Any
    dtype: str
    nbytes: int


def find_model(name: str) -> ModelSource:
    """The model of a folder or a Hugging Face id, checked before any weight is read.

    Raises ModelError when it does not exist or cannot be served.
    """
    path = _folder(name)
    file = path / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path} is not a model folder: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from None
    try:
        signature = signature_from_config(config)
    except ValueError as error:
        raise ModelError(str(error)) from None
    refusals = []
    for adapter in cache_adapters():
        refusal = adapter.refusal(config, signature)
        if refusal is None:
            return ModelSource(name, path, config, signature, adapter, _max_tokens(config))
        refusals.append(refusal)
    raise ModelError(f"{name} cannot be served: {'; '.join(refusals)}")


def load_model(
    source: ModelSource, dtype: str = "auto", progress: Progress | None = None
) -> LoadedModel:
    """Read the weights, on the thread that will decode. ``progress`` counts layers.

    Raises ModelError when the weights do not fit the configuration or are not there.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model as mlx_load

    from mlx_receiver.cache import mlx_dtype

    try:
        model, _ = mlx_load(source.path, lazy=True)
        if dtype != "auto":
            model.set_dtype(mlx_dtype(dtype))
        total = len(model.layers)
        for done, layer in enumerate(model.layers, 1):
            mx.eval(layer.parameters())
            if progress is not None:
                progress("Loading", done, total)
        mx.eval(model.parameters())
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"loading {source.name} failed: {error}") from error
    model.eval()
    # What the model computes, not what it stores: quantised and mixed weights do not tell.
    probe = source.adapter.empty(source.signature)
    mx.eval(model(mx.array([[0]]), cache=probe))
    computed = str(probe[0].keys.dtype).rpartition(".")[2]
    nbytes = sum(weight.nbytes for _, weight in tree_flatten(model.parameters()))
    return LoadedModel(model, computed, nbytes)


def cache_adapters() -> list[CacheAdapter]:
    """Every installed cache adapter."""
    found = [item for group in hooks.manager().hook.mac_decode_cache_adapters() for item in group]
    if not found:
        from mlx_receiver.cache import PlainKV

        found = [PlainKV()]
    return found


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no folder {name}")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]
            )
        )
    except Exception as error:
        first = str(error).strip().splitlines()
        raise ModelError(
            f"{name} is neither a folder nor a model that could be downloaded "
            f"({type(error).__name__}: {first[0] if first else ''})"
        ) from None


def _max_tokens(config: dict[str, Any]) -> int:
    """The model's context length in tokens; YaRN stretches the stated one."""
    text = config.get("text_config") or {}
    c = {**config, **text}
    stated = c.get("max_position_embeddings")
    if not isinstance(stated, int) or stated < 1:
        return _DEFAULT_MAX_TOKENS
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    if (rope.get("rope_type") or rope.get("type")) == "yarn":
        original = rope.get("original_max_position_embeddings") or stated
        return max(stated, int(original * float(rope.get("factor", 1.0))))
    return stated
