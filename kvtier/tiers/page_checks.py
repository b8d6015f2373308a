"""The checks of kernels/cpu/pages.cpp in Python, step by step the same and with the same answers.

    page: 0 own number u64, 10 flags u16, 12 lower u16, 14 upper u16 (overflow: 12 pages u32)
    meta: at 16: magic, version u32; 40 two databases; 136 last page u64, 144 transaction u64
    node: 0 length of value u32 (branch: child u48), 4 flags u16, 6 length of key u16, key, value

Every page of the newest meta page's trees has its own number, type and depth; its nodes fill it
without a gap or overlap; keys have their form, order, and place between the separators above; each
page is in one tree or in the free list, once; the counters are what was found; and every record has
the checksum that it was written with.

Does not: read the file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, NamedTuple, NoReturn

import xxhash

_PROBLEMS: Final = (
    "", "the file ends before it", "no meta page of ours, or not of its turn",
    "the number of the last page is beyond belief", "the record of a database is damaged",
    "names a page that there cannot be", "used, or free, more than once",
    "its number, type or bounds are damaged", "nodes do not lie in it one after another",
    "a key's form, order or place is damaged", "a value of a kind that is not written there",
    "a list of free pages is damaged", "a record's checksum is wrong",
    "a database has other counts than its record says", "neither used nor free",
)  # fmt: skip
(_SHORT, _META, _LAST, _DATABASE, _RANGE, _TWICE, _HEADER, _NODES, _KEYS, _VALUE, _FREE, _RECORD,
 _COUNTS, _LEAKED) = range(1, len(_PROBLEMS))  # fmt: skip

_HEADER_BYTES: Final = 16
_METAS: Final = 2
_META_BYTES: Final = _HEADER_BYTES + 136
_SLACK_PAGES: Final = 1 << 20  # free pages at the end may never have been written
_NO_ROOT: Final = 2**64 - 1
_MAGIC: Final = 0xBEEFC0DE
_VERSION: Final = 1
_DEPTH_MAX: Final = 32
_BRANCH_PAGE, _LEAF_PAGE, _OVERFLOW_PAGE, _META_PAGE = 1, 2, 4, 8
_BIG_DATA, _SUB_DATA = 1, 2  # flags of nodes
_INTEGER_KEY: Final = 8
_KEY_BYTES_MAX: Final = 511
_RECORD_BYTES_MIN: Final = 12  # checksum, slot
_KEY_BYTES: Final = {"free": 8, "slots": 4}  # integers; others compare as bytes
_HEAD: Final = struct.Struct("<QHHHH")
_MAGIC_VERSION: Final = struct.Struct("<II")
_NODE: Final = struct.Struct("<IHH")
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


@dataclass(frozen=True)
class Damage:
    """The first thing found wrong, and on which page of the file."""

    problem: int
    page: int

    def __str__(self) -> str:
        return f"page {self.page}: {_PROBLEMS[self.problem]}"


class Damaged(Exception):
    """`damage` was found."""

    def __init__(self, problem: int, page: int) -> None:
        super().__init__(problem, page)
        self.damage = Damage(problem, page)


def _fail(problem: int, page: int) -> NoReturn:
    raise Damaged(problem, page)


class _Database(NamedTuple):
    pad: int
    flags: int
    depth: int
    branches: int
    leaves: int
    overflows: int
    entries: int
    root: int


_DATABASE_RECORD: Final = struct.Struct("<IHHQQQQQ")


class _Tree:
    def __init__(self, kind: str, depth: int) -> None:
        self.kind = kind
        self.depth = depth
        self.branches = self.leaves = self.overflows = self.entries = 0
        self.key_bytes = _KEY_BYTES.get(kind, 0)

    def order(self, key: bytes) -> bytes:
        """What compares as the database compares its keys."""
        return key[::-1] if self.key_bytes else key


class Checker:
    """Of one file, whole in memory. `keys` and `values` are its records once `run` is over."""

    def __init__(self, file: memoryview) -> None:
        self.keys: list[bytes] = []
        self.values: list[bytes] = []
        self._file = file
        self._page_bytes = self._pages = self._next = self._txnid = self._node_bytes_max = 0
        self._seen = bytearray()

    def run(self) -> None:
        """Raises Damaged."""
        if not self._file:
            return
        meta = self._read_metas()
        at = meta * self._page_bytes + _HEADER_BYTES + 24
        free = _Database(*_DATABASE_RECORD.unpack_from(self._file, at))
        main = _Database(*_DATABASE_RECORD.unpack_from(self._file, at + _DATABASE_RECORD.size))
        if free.flags != _INTEGER_KEY or main.flags or main.pad:
            _fail(_DATABASE, meta)
        self._check("free", free, meta)
        self._check("main", main, meta)
        leaked = self._seen.find(0, _METAS)
        if leaked >= 0:
            _fail(_LEAKED, leaked)

    def _read_metas(self) -> int:
        """The meta page that counts, as LMDB chooses it."""
        file = self._file
        if len(file) < _META_BYTES:
            _fail(_SHORT, 0)
        (size,) = _U32.unpack_from(file, _HEADER_BYTES + 24)
        if size < 512 or size > 0x8000 or size & (size - 1):
            _fail(_META, 0)
        self._page_bytes, self._pages = size, len(file) // size
        if self._pages < _METAS:
            _fail(_SHORT, 1)
        self._node_bytes_max = ((size - _HEADER_BYTES) // 2 & ~1) - 2
        txnids = []
        for number in range(_METAS):
            at = number * size
            own, _, flags, _, _ = _HEAD.unpack_from(file, at)
            meta = at + _HEADER_BYTES
            (page_bytes,) = _U32.unpack_from(file, meta + 24)
            known = _MAGIC_VERSION.unpack_from(file, meta) == (_MAGIC, _VERSION)
            if own != number or flags != _META_PAGE or not known or page_bytes != size:
                _fail(_META, number)
            txnids.append(_U64.unpack_from(file, meta + 128)[0])
        meta = int(txnids[0] < txnids[1])
        # Transaction n writes page n % 2; the other one is of the transaction before.
        if txnids != [0, 0] and (abs(txnids[0] - txnids[1]) != 1 or txnids[0] % 2):
            _fail(_META, meta)
        self._txnid = txnids[meta]
        (last,) = _U64.unpack_from(file, meta * size + _HEADER_BYTES + 120)
        if last < _METAS - 1 or last >= self._pages + max(self._pages, _SLACK_PAGES):
            _fail(_LAST, meta)
        self._next = last + 1
        self._seen = bytearray(self._next)
        return meta

    def _see(self, number: int, source: int) -> None:
        """Each page is part of one tree, or free, once."""
        if number < _METAS or number >= self._next:
            _fail(_RANGE, source)
        if self._seen[number]:
            _fail(_TWICE, number)
        self._seen[number] = 1

    def _check(self, kind: str, database: _Database, source: int) -> None:
        tree = _Tree(kind, database.depth)
        if database.root != _NO_ROOT:
            if not 1 <= database.depth <= _DEPTH_MAX:
                _fail(_DATABASE, source)
            self._walk(tree, database.root, 1, source, None, None)
        elif database.depth:
            _fail(_DATABASE, source)
        if (tree.branches, tree.leaves, tree.overflows, tree.entries) != database[3:7]:
            _fail(_COUNTS, source)

    def _walk(
        self, tree: _Tree, number: int, depth: int, source: int, low: bytes | None,
        high: bytes | None,
    ) -> None:  # fmt: skip
        """One page and all below it; their keys are in [low, high)."""
        self._see(number, source)
        if number >= self._pages:
            _fail(_SHORT, number)
        leaf = depth == tree.depth
        page = self._file[number * self._page_bytes : (number + 1) * self._page_bytes]
        own, _, flags, lower, upper = _HEAD.unpack_from(page)
        if (
            own != number
            or flags != (_LEAF_PAGE if leaf else _BRANCH_PAGE)
            or lower < _HEADER_BYTES
            or lower % 2
            or not lower <= upper <= self._page_bytes
        ):
            _fail(_HEADER, number)
        offsets = page[_HEADER_BYTES:lower].cast("H").tolist()
        if len(offsets) < (1 if leaf else 2):
            _fail(_HEADER, number)
        nodes = self._nodes(page, offsets, upper, number, leaf=leaf)
        if leaf:
            tree.leaves += 1
        else:
            tree.branches += 1
        keys = [bytes(page[at + 8 : at + 8 + key]) for at, _, _, key in nodes]
        self._check_keys(tree, keys, number, low, high, leaf=leaf)
        if leaf:
            for node, key in zip(nodes, keys, strict=True):
                self._value(tree, page, node, key, number)
            return
        ends = [*map(tree.order, keys[1:]), high]
        start = low
        for (_, length, node_flags, _), end in zip(nodes, ends, strict=True):
            self._walk(tree, length | node_flags << 32, depth + 1, number, start, end)
            start = end

    def _nodes(
        self, page: memoryview, offsets: list[int], upper: int, number: int, *, leaf: bool
    ) -> list[tuple[int, int, int, int]]:
        """Offset, length, flags and key length of each; they lie in [upper, page end) one after
        another: none is cut off, shared or missing.
        """
        nodes, ends = [], {}
        for at in offsets:
            if at < upper or at % 2 or at + 8 > self._page_bytes:
                _fail(_NODES, number)
            length, flags, key = _NODE.unpack_from(page, at)
            size = 8 + key
            if leaf:
                size += 8 if flags & _BIG_DATA else length
                if size > (self._page_bytes if flags & _BIG_DATA else self._node_bytes_max):
                    _fail(_NODES, number)
            ends[at] = at + size + size % 2
            nodes.append((at, length, flags, key))
        # Each starts where another ends (the first: at upper), and none runs over the page.
        if len(ends) != len(nodes) or upper % 2:
            _fail(_NODES, number)
        at = upper
        for _ in nodes:
            at = ends.get(at, -1)
        if at != self._page_bytes:
            _fail(_NODES, number)
        return nodes

    def _check_keys(
        self, tree: _Tree, keys: list[bytes], number: int, low: bytes | None, high: bytes | None,
        *, leaf: bool,
    ) -> None:  # fmt: skip
        fixed = tree.key_bytes
        before, strict = low, not leaf
        # The first node of a branch page has no key that counts.
        for key in keys if leaf else keys[1:]:
            if len(key) != fixed if fixed else not 1 <= len(key) <= _KEY_BYTES_MAX:
                _fail(_KEYS, number)
            this = key[::-1] if fixed else key
            if before is not None and (this < before or (this == before and strict)):
                _fail(_KEYS, number)
            before, strict = this, True
        if high is not None and before is not None and before >= high:
            _fail(_KEYS, number)

    def _value(
        self, tree: _Tree, page: memoryview, node: tuple[int, int, int, int], key: bytes,
        number: int,
    ) -> None:  # fmt: skip
        offset, length, flags, key_bytes = node
        at = offset + 8 + key_bytes
        tree.entries += 1
        if tree.kind == "free":
            value = page[at : at + length]
            if flags == _BIG_DATA:
                value = self._overflow(tree, _U64.unpack_from(page, at)[0], length, number)
            elif flags:
                _fail(_VALUE, number)
            self._free_list(key, value, number)
        elif tree.kind == "slots":
            if flags:
                _fail(_VALUE, number)
            record = bytes(page[at : at + length])
            if (
                length < _RECORD_BYTES_MIN
                or record[8:12] != key
                or xxhash.xxh3_64_intdigest(record[8:]).to_bytes(8, "little") != record[:8]
            ):
                _fail(_RECORD, number)
            self.keys.append(key)
            self.values.append(record)
        elif tree.kind == "main" and flags == _SUB_DATA and length == _DATABASE_RECORD.size:
            database = _Database(*_DATABASE_RECORD.unpack_from(page, at))
            slots = key == b"slots"
            if database.flags != (_INTEGER_KEY if slots else 0) or database.pad:
                _fail(_DATABASE, number)
            self._check("slots" if slots else "other", database, number)
        elif flags:
            _fail(_VALUE, number)

    def _overflow(self, tree: _Tree, first: int, length: int, source: int) -> memoryview:
        self._see(first, source)
        if first >= self._pages:
            _fail(_SHORT, first)
        at = first * self._page_bytes
        own, _, flags, _, _ = _HEAD.unpack_from(self._file, at)
        (count,) = _U32.unpack_from(self._file, at + 12)
        enough = (_HEADER_BYTES - 1 + length) // self._page_bytes + 1
        if own != first or flags != _OVERFLOW_PAGE or count < enough:
            _fail(_HEADER, first)
        if count > self._pages - first:
            _fail(_SHORT, first)
        for number in range(first + 1, first + count):
            self._see(number, first)
        tree.overflows += count
        return self._file[at + _HEADER_BYTES : at + _HEADER_BYTES + length]

    def _free_list(self, key: bytes, value: memoryview, number: int) -> None:
        txnid = int.from_bytes(key, "little")
        if not 1 <= txnid <= self._txnid or len(value) < 8 or len(value) % 8:
            _fail(_FREE, number)
        count, *pages = struct.unpack(f"<{len(value) // 8}Q", value)
        if count != len(pages):
            _fail(_FREE, number)
        before = _NO_ROOT
        for page in pages:
            if page >= before:
                _fail(_FREE, number)
            self._see(page, number)
            before = page
