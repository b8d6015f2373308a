"""TransformersCache: a Hugging Face model's prompt KV, kept by kvtier and given back.

    cache = TransformersCache(model)  # the node's daemon; or give its socket, or a Client
    ids = cache.generate(input_ids, max_new_tokens=64)  # instead of model.generate(...)

A request's life: `restore` looks the prompt's blocks up, leases them and copies them into a new
`DynamicCache`, never the last token's (a model given nothing to compute answers wrongly and
without an error); the engine generates with all ids; `save` stores the prompt's whole blocks.
Block bytes are `[layers, K and V, heads, tokens, head_dim]`, contiguous.

No failure of kvtier leaves this file: it becomes a miss (see base.Border). Whatever is not
provably the same as computing it is passed by: caches that are not plain KV, padding that is not
on the left, beams, assistants. Does not: decide what is kept; share between differing models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvtier.block import BlockFormat, Reason
from kvtier.connectors import hf_copy, hf_model
from kvtier.connectors.base import (
    HASH_ALGORITHM,
    Border,
    KeyChain,
    Lease,
    LeasedFound,
    ReservedBlock,
    Space,
    miss_reason,
)
from kvtier.connectors.hf_model import ModelShape, Unsupported
from kvtier.connectors.hf_request import Row, cache_argument, check_generate, rows_of

if TYPE_CHECKING:
    import torch
    from transformers.cache_utils import DynamicCache

LAYOUT = "LKHTD"


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore gave: a cache holding the first `token_count` tokens of every row, or None."""

    cache: DynamicCache | None = None
    token_count: int = 0
    blocks_by_tier: dict[str, int] = field(default_factory=dict)
    reason: str = Reason.NONE

    @property
    def tier(self) -> str:
        """Where the blocks lay when they were looked up: a tier, `mixed`, or `-`."""
        tiers = [tier for tier, count in self.blocks_by_tier.items() if count]
        return "-" if not tiers else tiers[0] if len(tiers) == 1 else "mixed"


class TransformersCache:
    """Saves and restores the KV of one model. One thread at a time, like the model itself.

    `client` is a `kvtier.client.Client`, the path or URL of a socket, or None for the default
    socket; it is connected at the first use, and a daemon that is not there is a miss. A lookup
    answers within `deadline_s` (None: the client's own); with `prefill_tokens_per_s` given, loads
    slower than computing are not offered. `last` is what the latest `restore` gave, but its cache.
    """

    def __init__(
        self,
        model: Any,
        client: Any = None,
        *,
        block_tokens: int = 16,
        model_id: str = "",
        salt: str = "",
        save_generated: bool = False,
        deadline_s: float | None = None,
        prefill_tokens_per_s: float = 0.0,
    ) -> None:
        self.model = model
        self.save_generated = save_generated
        self.border = Border(f"transformers connector of {hf_model.model_name(model)}")
        self.last = Restored()
        self._model_id = model_id or hf_model.model_name(model)
        self._chain = KeyChain(block_tokens=block_tokens, salt=salt)
        self._client = None if isinstance(client, str) else client
        self._socket = client if isinstance(client, str) else None
        self._owns_client = self._client is None
        self._space: Space | None = None
        self._identity = ("", "")
        self._deadline_s = deadline_s
        self._prefill_tokens_per_s = prefill_tokens_per_s
        self._shape: ModelShape | None = None
        self._unsupported = ""

    # --- a request's life

    def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """`model.generate(input_ids, **kwargs)` with what kvtier has, saving what it has not."""
        from transformers.cache_utils import DynamicCache

        mask = kwargs.get("attention_mask")
        reason = self._refusal(lambda: self._check(input_ids, mask, kwargs))
        if reason:
            self._miss(input_ids, reason)
            return self.model.generate(input_ids, **kwargs)
        cache = self.restore(input_ids, mask).cache
        if cache is None:
            cache = DynamicCache(config=self.model.config)
        output = self.model.generate(input_ids, **{cache_argument(): cache}, **kwargs)
        ids, computed = input_ids, mask
        if self.save_generated:
            ids = output if not hasattr(output, "sequences") else output.sequences
            computed = _extended(mask, ids)
        self.save(ids, cache, computed)
        return output

    def restore(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> Restored:
        """The longest prefix every row of the batch has in kvtier, less than the whole prompt."""
        reason = self._refusal(lambda: self._check(input_ids, attention_mask))
        if reason:
            self._miss(input_ids, reason)
            return self.last
        restored = Restored(reason=Reason.DAEMON_DOWN)
        with self.border.crossing("restore") as crossed:
            rows = rows_of(self.model, input_ids, attention_mask)
            restored = self._restore(rows, input_ids.shape[1])
        if crossed.failed is not None:
            restored = Restored(reason=miss_reason(crossed.failed))
        self.border.found(
            found_tokens=restored.token_count * input_ids.shape[0],
            asked_tokens=input_ids.numel(),
            reason=restored.reason,
        )
        self.last = Restored(None, restored.token_count, restored.blocks_by_tier, restored.reason)
        return restored

    def save(
        self,
        input_ids: torch.Tensor,
        cache: DynamicCache,
        attention_mask: torch.Tensor | None = None,
    ) -> int:
        """Stores the whole blocks of `input_ids` that `cache` holds; returns how many were new."""
        stored = 0
        if self._refusal(lambda: self._check(input_ids, attention_mask)):
            return stored
        with self.border.crossing("save"):
            layers = self._layers_of(cache, input_ids.shape[0])
            length = min(input_ids.shape[1], cache.get_seq_length()) if layers else 0
            for index, row in enumerate(rows_of(self.model, input_ids, attention_mask)):
                stored += self._save_row(layers, index, row, length) if length else 0
        self.border.saved_blocks += stored
        return stored

    def close(self) -> None:
        """Ends the connection if it is ours. The cache can be used again: it reconnects."""
        self._space, client = None, self._client
        if self._owns_client and client is not None:
            self._client = None
            with self.border.crossing("close"):
                client.close()

    # --- prompt by prompt

    def _restore(self, rows: Sequence[Row], width: int) -> Restored:
        space, step = self._opened(), self._chain.block_tokens
        wanted = width - 1  # at least one token is left to compute
        leases: list[Lease] = []
        tiers: list[list[str]] = []
        with ExitStack() as held:
            for row in rows:
                count = -(-(wanted - row.padding) // step)
                keys = self._chain.keys(row.tokens)[: max(count, 0)]
                if not keys:
                    return Restored(reason=Reason.NEVER_STORED)
                found = space.lookup(keys, lease=True, deadline_s=self._deadline_s)
                if found.lease is None:
                    return Restored(reason=found.reason)
                lease = held.enter_context(found.lease)
                if not lease.block_count:
                    return Restored(reason=lease.reason)
                wanted = min(wanted, row.padding + lease.block_count * step)
                leases.append(lease)
                tiers.append(_tiers_of(found))
            if wanted <= max(row.padding for row in rows):
                return Restored(reason=Reason.NEVER_STORED)
            kv = hf_copy.gathered(
                self._shape_known(),
                step,
                ((row.padding, lease.views) for row, lease in zip(rows, leases, strict=True)),
                row_count=len(rows),
                length=wanted,
            )
            for lease in leases:
                lease.check()  # what was copied is what was leased, or LeaseLost
        by_tier: dict[str, int] = {}
        for row, names in zip(rows, tiers, strict=True):
            for name in names[: -(-(wanted - row.padding) // step)]:
                by_tier[name] = by_tier.get(name, 0) + 1
        return Restored(hf_copy.filled(self.model, kv), wanted, by_tier)

    def _save_row(self, layers: Sequence[Any], index: int, row: Row, length: int) -> int:
        """Stores one row's blocks that lie before `length`, as many as there is room for."""
        step = self._chain.block_tokens
        keys = self._chain.keys(row.tokens)[: (length - row.padding) // step]
        if not keys:
            return 0
        starts = {key: row.padding + step * i for i, key in enumerate(keys)}
        shape, source = self._shape_known(), hf_copy.RowKV(layers, index)

        def fill(block: ReservedBlock) -> None:
            source.write(block.view, shape, starts[bytes(block.key)], step)

        return self._opened().store(keys, fill).stored_count

    # --- who and where

    def _opened(self) -> Space:
        """The namespace of this model as it is now; a new one when its weights have changed."""
        weights = hf_model.weights_fingerprint(self.model)
        config = hf_model.engine_config(self.model)
        if self._space is None or (weights, config) != self._identity:
            if self._client is None:
                from kvtier.client import Client

                self._client = Client(self._socket, client_name=f"transformers {self._model_id}")
            shape = self._shape_known()
            self._space = self._client.space(
                model=self._model_id,
                format=BlockFormat(
                    layers=shape.layers,
                    kv_heads=shape.kv_heads,
                    head_dim=shape.head_dim,
                    dtype=shape.dtype,
                    block_tokens=self._chain.block_tokens,
                    layout=LAYOUT,
                ),
                weights=weights,
                engine_config=config,
                hash_algorithm=HASH_ALGORITHM,
                hash_seed=self._chain.salt,
                prefill_tokens_per_s=self._prefill_tokens_per_s,
            )
            self._identity = (weights, config)
        assert self._space is not None
        return self._space

    def _check(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Raises Unsupported when model or request cannot be served."""
        if self._unsupported:
            raise Unsupported(self._unsupported)
        if self._shape is None:
            self._shape = hf_model.shape_of(self.model)
        if kwargs is None:
            rows_of(self.model, input_ids, mask)
        else:
            check_generate(self.model, input_ids, kwargs)

    def _shape_known(self) -> ModelShape:
        assert self._shape is not None, "asked before _check()"
        return self._shape

    def _layers_of(self, cache: DynamicCache, row_count: int) -> Any:
        """The cache's layers if they are what the namespace says; otherwise none, from now on."""
        from transformers.cache_utils import DynamicLayer

        shape = self._shape_known()
        layers: Any = cache.layers
        size = (row_count, shape.kv_heads, cache.get_seq_length(), shape.head_dim)
        for layer in layers:
            plain = type(layer) is DynamicLayer and layer.is_initialized
            kv = (layer.keys, layer.values) if plain else ()
            if len(layers) != shape.layers or not kv:
                self._unsupported = "the cache it filled is not a plain DynamicCache"
            elif any(tuple(t.shape) != size or str(t.dtype) != f"torch.{shape.dtype}" for t in kv):
                self._unsupported = f"its KV is not {size} of {shape.dtype} in every layer"
        if self._unsupported:
            self.border.say_once(f"nothing is kept: {self._unsupported}")
            return ()
        return layers

    def _refusal(self, question: Callable[[], None]) -> str:
        """Why this model or request is passed by ("" = it is not); said once."""
        why = "kvtier failed while it looked at the request"
        with self.border.crossing("examine"):
            try:
                question()
            except Unsupported as error:
                why = str(error)
                self.border.say_once(f"passed by, generated without kvtier: {error}")
            else:
                why = ""
        return why

    def _miss(self, input_ids: torch.Tensor, reason: str) -> None:
        self.border.found(found_tokens=0, asked_tokens=input_ids.numel(), reason=reason)
        self.last = Restored(reason=reason)

    def __repr__(self) -> str:
        return f"<TransformersCache {self._model_id}: {self.border!r}>"


def _tiers_of(found: LeasedFound) -> list[str]:
    """The tier of each found block, first to last."""
    return [run.tier.label for run in found.runs for _ in range(run.block_count)]


def _extended(mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor | None:
    """The prompt's mask with ones for what was generated."""
    if mask is None:
        return None
    import torch

    return torch.cat([mask, mask.new_ones((ids.shape[0], ids.shape[1] - mask.shape[1]))], dim=1)
