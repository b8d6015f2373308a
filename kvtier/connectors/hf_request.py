"""A transformers request as kvtier sees it: its rows of tokens, and whether it may be served.

Does not: touch KV or the daemon.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from kvtier.connectors.hf_model import Unsupported

if TYPE_CHECKING:
    import torch

# Arguments of generate() that are no settings and do not change the prompt's KV.
_HARMLESS = {
    "attention_mask", "generation_config", "logits_processor", "prefix_allowed_tokens_fn",
    "stopping_criteria", "streamer", "synced_gpus",
}  # fmt: skip
# Settings, and the values with which the cache means what we think it means.
_NEEDED = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "use_cache": (None, True),
    "cache_implementation": (None, "dynamic"),
    "prompt_lookup_num_tokens": (None,),
    "prefill_chunk_size": (None,),
    "guidance_scale": (None, 1, 1.0),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "assistant_early_exit": (None,),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt of a batch: its tokens, after `padding` columns of padding on the left."""

    tokens: list[int]
    padding: int


def rows_of(model: Any, input_ids: torch.Tensor, mask: torch.Tensor | None) -> list[Row]:
    """The prompts of a batch.

    A row's KV does not depend on padding on its left, because transformers counts positions from
    the first token that is not masked.

    Raises:
        Unsupported: padding elsewhere, or a model that does not take positions.
    """
    if mask is None:
        pad = getattr(model.generation_config, "pad_token_id", None)
        if pad is not None and bool((input_ids == pad).any()):
            raise Unsupported("the prompt holds the padding token and there is no attention mask")
        return [Row(tokens, 0) for tokens in input_ids.tolist()]
    if tuple(mask.shape) != tuple(input_ids.shape):
        raise Unsupported("the attention mask is not of the prompt's shape")
    if not bool(((mask == 0) | (mask == 1)).all()) or bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise Unsupported("the attention mask hides tokens that are not padding on the left")
    paddings = (mask.shape[1] - mask.sum(dim=1)).tolist()
    if any(paddings) and "position_ids" not in inspect.signature(model.forward).parameters:
        raise Unsupported("the batch is padded and the model takes no position_ids")
    rows = zip(input_ids.tolist(), paddings, strict=True)
    return [Row(tokens[int(padding) :], int(padding)) for tokens, padding in rows]


@lru_cache(maxsize=1)
def cache_argument() -> str:
    """What `generate` and `forward` of this version of transformers call the KV they are given:
    `cache` (seen in 5.24), or `past_key_values` (4.56).
    """
    from transformers.generation.utils import GenerationMixin

    named = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in named else "past_key_values"


def check_generate(model: Any, input_ids: torch.Tensor, kwargs: Mapping[str, Any]) -> None:
    """Raises Unsupported when `generate` with these arguments is not plain decoding."""
    import transformers

    if input_ids.ndim != 2 or not input_ids.numel():
        raise Unsupported("the prompt is not a batch of token ids")
    engine: Any = transformers
    settings = engine.GenerationConfig()
    for name, value in kwargs.items():
        if name not in _HARMLESS and not hasattr(settings, name) and value is not None:
            raise Unsupported(f"generate() was given {name}")
    sources = (kwargs.get("generation_config"), model.generation_config)
    for name, allowed in _NEEDED.items():
        value = kwargs.get(name)
        for source in sources:
            value = getattr(source, name, None) if value is None else value
        if value not in allowed:
            raise Unsupported(f"generate() was given {name}={value}")
    if kwargs.get("return_legacy_cache"):
        raise Unsupported("generate() was given return_legacy_cache")
    rows_of(model, input_ids, kwargs.get("attention_mask"))
