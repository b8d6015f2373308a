"""What of a Hugging Face model decides whether its KV can be kept, and for whom it is good.

Does not: touch KV. Asks torch and transformers only when called.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_SAMPLES_PER_TENSOR = 1024
_FINGERPRINT = "_kvtier_fingerprint"
# Rotary variants whose keys depend on the length of the whole sequence, not only on position.
_ROPE_BY_LENGTH = ("dynamic", "longrope")
# Not part of what KV is: where the model came from and what wrote the file.
_CONFIG_IGNORED = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")


class Unsupported(Exception):
    """This model's or request's KV cannot be kept; the message says why. Never leaves us."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One layer's KV is `[batch, kv_heads, tokens, head_dim]` of `dtype`; all layers are equal."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str


def shape_of(model: Any) -> ModelShape:
    """The shape of a model's KV.

    Raises:
        Unsupported: its cache is not plain attention KV that depends on tokens before it only.
    """
    config = model.config.get_text_config(decoder=True)
    _check_config(model, config)
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in ("float32", "float16", "bfloat16"):
        raise Unsupported(f"its KV is {dtype}, not float32, float16 or bfloat16")
    devices = {str(tensor.device) for _, tensor in _tensors(model)}
    if len(devices) != 1 or "meta" in devices:
        raise Unsupported(f"its weights lie on {', '.join(sorted(devices))}, not on one device")
    heads = config.num_attention_heads
    return ModelShape(
        layers=_plain_layers(model),
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
    )


def model_name(model: Any) -> str:
    """A name for people: the hub's id, the last part of a local path, or the class."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if name.startswith(("/", ".", "~")):
        name = PurePath(name).name
    return name[:256] or type(model).__name__


def engine_config(model: Any) -> str:
    """What besides weights decides the bytes: configuration, attention, rope, device, release."""
    import transformers

    config = model.config.get_text_config(decoder=True)
    plain = {k: v for k, v in config.to_dict().items() if k not in _CONFIG_IGNORED}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()
    rope = json.dumps(_rope(config), sort_keys=True, default=str)
    adapters = getattr(model, "active_adapters", None) if _has_adapters(model) else None
    return " ".join(
        (
            f"config={digest[:32]}",
            f"attention={getattr(config, '_attn_implementation', '')}",
            f"rope={hashlib.sha256(rope.encode()).hexdigest()[:16]}",
            f"device={model.device.type}",
            f"class={type(model).__name__}",
            f"adapters={_called(adapters)}",
            f"transformers={'.'.join(transformers.__version__.split('.')[:2])}",
        )
    )[:1024]


def weights_fingerprint(model: Any) -> str:
    """A digest of the weights: names, shapes, types, a sum over all bits and a sample of each.

    Kept on the model and computed again when a tensor was replaced or written in place (torch
    counts both; a write through `.data` it does not: call `forget_fingerprint` then). Cost: one
    read of the weights.
    """
    stamp = _stamp(model)
    kept = getattr(model, _FINGERPRINT, None)
    if kept and kept[0] == stamp:
        return str(kept[1])
    hasher = hashlib.sha256()
    for name, tensor in _tensors(model):
        hasher.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        hasher.update(_content(tensor))
    digest = hasher.hexdigest()
    setattr(model, _FINGERPRINT, (stamp, digest))
    return digest


def forget_fingerprint(model: Any) -> None:
    """The weights were changed in a way torch does not count."""
    if hasattr(model, _FINGERPRINT):
        delattr(model, _FINGERPRINT)


def weights_changed(model: Any) -> bool:
    """Whether `weights_fingerprint` would have to read the weights again. Microseconds."""
    kept = getattr(model, _FINGERPRINT, None)
    return not kept or kept[0] != _stamp(model)


def _check_config(model: Any, config: Any) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise Unsupported("it is an encoder-decoder model")
    if getattr(model, "_is_stateful", False):
        raise Unsupported("it keeps a state, not KV of every token")
    if getattr(config, "kv_lora_rank", None):
        raise Unsupported("its attention is multi-head latent (keys and values differ in size)")
    if getattr(config, "use_bidirectional_attention", False):
        raise Unsupported("its attention is not causal")
    rope = _rope(config)
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in _ROPE_BY_LENGTH:
            raise Unsupported(f"its rope type {part['rope_type']} depends on the sequence's length")


def _rope(config: Any) -> dict[str, Any]:
    """Rotary settings; releases before 5 call them rope_scaling."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return dict(rope or {})


def _plain_layers(model: Any) -> int:
    """How many layers its cache has, if all are plain ones."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=model.config).layers
    odd = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if odd or not layers:
        raise Unsupported(f"its cache has layers of other kinds ({', '.join(odd) or 'none'})")
    return len(layers)


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that decides KV: the state, and rope's frequencies, which are not saved in it."""
    yield from model.named_parameters(remove_duplicate=False)
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in saved or name.endswith("inv_freq"):
            yield name, buffer


def _stamp(model: Any) -> int:
    """Changes when a tensor is replaced or written in place."""
    return hash(
        tuple(
            (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)  # noqa: SLF001
            for tensor in model.parameters()
        )
    )


def _content(tensor: torch.Tensor) -> bytes:
    """A sum over every bit and evenly spaced samples; the same on any device."""
    import torch

    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().reshape(-1)
    if not flat.numel():
        return b""
    bits = flat.view(whole[flat.element_size()])
    stride = max(1, bits.numel() // _SAMPLES_PER_TENSOR)
    sample = bits[::stride].to("cpu", torch.int64).contiguous()
    total = int(bits.sum(dtype=torch.int64).item())
    return total.to_bytes(8, "little", signed=True) + sample.numpy().tobytes()


def _has_adapters(model: Any) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"))


def _called(value: Any) -> str:
    try:
        return str(value() if callable(value) else value)
    except ValueError:  # transformers: no adapter loaded
        return "None"
