"""The two copies between a Hugging Face model's KV and blocks: leased views in, reserved views out.

A block is `[layers, K and V, heads, tokens, head_dim]`, contiguous. Bits are copied, as integers of
the element's size, by numpy in the calling thread: torch would split each block over its threads
and wait for the slowest of them, for every block. A GPU is reached by one copy of the whole.

Does not: know keys, namespaces or leases' lives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kvtier.block import DTYPE_BYTES
from kvtier.connectors.hf_model import ModelShape

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers.cache_utils import DynamicCache

    Bits = np.ndarray[Any, np.dtype[Any]]


def gathered(
    shape: ModelShape,
    block_tokens: int,
    rows: Iterable[tuple[int, Sequence[memoryview]]],
    *,
    row_count: int,
    length: int,
) -> torch.Tensor:
    """`[layers, 2, rows, heads, length, head_dim]` in host memory, from each row's blocks.

    `rows` are (columns of padding, views); padding is zero. The copy is done once this returns.
    """
    import torch

    size = (shape.layers, 2, row_count, shape.kv_heads, length, shape.head_dim)
    kv = torch.empty(size, dtype=getattr(torch, shape.dtype))
    target = _bits(kv)
    for index, (padding, views) in enumerate(rows):
        target[:, :, index, :, :padding] = 0
        for start, view in zip(range(padding, length, block_tokens), views, strict=False):
            count = min(block_tokens, length - start)
            block = _block(view, shape, block_tokens)
            target[:, :, index, :, start : start + count] = block[..., :count, :]
    return kv


def filled(model: Any, kv: torch.Tensor) -> DynamicCache:
    """A cache of this model that holds `kv` (see `gathered`)."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache(config=model.config)
    layers: Any = cache.layers
    for layer, (keys, values) in zip(layers, kv.to(model.device), strict=True):
        # As its lazy_initialization does (whose arguments differ between releases), and without
        # the copy that update() makes.
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layer.keys, layer.values = keys, values
    return cache


class RowKV:
    """One row of a cache, to be written into blocks. Brought to host memory when first needed."""

    def __init__(self, layers: Sequence[Any], index: int) -> None:
        self._layers = layers
        self._index = index
        self._host: list[tuple[Bits, Bits]] = []

    def write(self, view: memoryview, shape: ModelShape, start: int, block_tokens: int) -> None:
        """The tokens from `start` on, into one block's bytes."""
        if not self._host:
            self._host = [
                (self._to_host(layer.keys), self._to_host(layer.values)) for layer in self._layers
            ]
        target = _block(view, shape, block_tokens)
        for number, (keys, values) in enumerate(self._host):
            target[number, 0] = keys[:, start : start + block_tokens]
            target[number, 1] = values[:, start : start + block_tokens]

    def _to_host(self, part: torch.Tensor) -> Bits:
        return _bits(part[self._index].detach().to("cpu"))


def _block(view: memoryview, shape: ModelShape, block_tokens: int) -> Bits:
    """A block's bytes as an array, without a copy; it keeps the lease or reservation alive."""
    import numpy as np

    kind = np.dtype(f"u{DTYPE_BYTES[shape.dtype]}")
    size = (shape.layers, 2, shape.kv_heads, block_tokens, shape.head_dim)
    return np.frombuffer(view, kind).reshape(size)


def _bits(tensor: torch.Tensor) -> Bits:
    """A host tensor's elements as integers of their size, sharing its memory."""
    import numpy as np
    import torch

    whole = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    bits: Bits = tensor.view(whole).numpy()
    return bits.view(np.dtype(f"u{tensor.element_size()}"))
