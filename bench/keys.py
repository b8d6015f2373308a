"""Chains of keys that look like an engine's: 32-byte hashes, each of which depends on the last.

Does not: hash tokens; a counter stands for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from kvtier.block import Keys

CHAIN_BLOCKS = 512


def chain(number: int, length: int = CHAIN_BLOCKS, *, salt: str = "") -> Keys:
    """Chain `number`: the same keys every time."""
    key = f"{salt}/{number}".encode()
    packed = bytearray()
    for _ in range(length):
        key = hashlib.blake2b(key, digest_size=32).digest()
        packed += key
    return Keys(bytes(packed), 32)


def chains(block_count: int, *, salt: str = "") -> Iterator[Keys]:
    """Chains of `CHAIN_BLOCKS` that together have `block_count` blocks."""
    return (chain(number, salt=salt) for number in range(block_count // CHAIN_BLOCKS))
