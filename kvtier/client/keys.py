"""packed_keys: the keys of a call, checked before anything is sent.

Does not: know what the keys are for.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvtier.block import Keys
from kvtier.errors import InvalidRequest

KeysLike = Sequence[bytes] | Keys


def packed_keys(keys: KeysLike) -> Keys:
    """The keys packed; given one by one also known to be distinct. A `Keys` costs nothing here:
    whether one is in it twice is asked where it matters, before blocks are written.

    Raises:
        InvalidRequest: none, too many, unequal or impossible lengths, not bytes, or one twice.
    """
    if isinstance(keys, Keys):
        return keys
    if isinstance(keys, (bytes, bytearray, memoryview, str)):
        raise InvalidRequest("keys must be a sequence of bytes objects, not one of them")
    try:
        lengths = set(map(len, keys))
        distinct_count = len(set(keys))
        packed = b"".join(keys)
    except TypeError as error:
        raise InvalidRequest(f"keys must be bytes: {error}") from None
    if not lengths:
        raise InvalidRequest("number of keys is 0; it must be at least 1")
    if len(lengths) != 1:
        raise InvalidRequest("keys of one call must have one length")
    if distinct_count != len(keys):
        raise InvalidRequest("the same key is given twice in one call")
    return Keys(packed, lengths.pop())
