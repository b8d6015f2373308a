"""Every noun goes over the wire and comes back equal; every error keeps its class."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvtier import wire
from kvtier.block import (
    BlockFormat,
    CommitResult,
    Event,
    EventKind,
    Found,
    GroupKind,
    GroupQuery,
    Keys,
    LeaseGrant,
    LookupAnswer,
    NamespaceSpec,
    Reason,
    ReserveGrant,
    SegmentView,
    SlotTable,
    TierId,
    TierRun,
)
from kvtier.errors import InvalidRequest, KvTierError
from kvtier.v1 import cache_pb2, types_pb2

FORMAT = BlockFormat(
    2, 4, 64, "float16", 16, "mla", GroupKind.SLIDING, window_tokens=99, layout="X", shards=2
)
TABLE = SlotTable(
    wire.pack_u32([1, 2**32 - 1]), 4096, 100, (SegmentView(0, 2**63, 4096),), {1: 5}, {2**63: 7}
)
GRANT = LeaseGrant(9, 4, 1, 4, TABLE)


def test_nouns_come_back_equal() -> None:
    spec = NamespaceSpec("m", FORMAT, "t", "w", "a", "q", "e", "l", "h", "s", "g")
    assert wire.decode_spec(wire.encode_spec(spec), "t") == spec
    query = GroupQuery(3, Keys(b"k" * 64, 32))
    assert wire.decode_query(wire.encode_query(query)) == query
    found = Found(4, (TierRun(TierId.DRAM, 1), TierRun(TierId.SSD, 3)), 2.5, Reason.EVICTED, 1)
    answer = LookupAnswer((found, Found(0)), 64, (GRANT, LeaseGrant(0, 0, 0, 0, None)))
    assert wire.decode_answer(wire.encode_answer(answer)) == answer
    reserve = ReserveGrant(7, (0, 3, 65_535), 5, 2, TABLE)
    assert wire.decode_reserve(wire.encode_reserve(reserve)) == reserve
    commit = CommitResult(1, 2, 3)
    assert wire.decode_commit(wire.encode_commit(commit)) == commit
    for event in (
        Event(5, EventKind.REMOVED, 3, b"k" * 32, 32, TierId.SSD, b"p" * 32),
        Event(6, EventKind.PROGRESS, 3),
    ):
        assert wire.decode_event(wire.encode_event(event), 3) == event


def test_every_reason_and_tier_has_a_number() -> None:
    assert {wire.decode_reason(number) for number in wire.REASON_NUMBERS.values()} == set(Reason)
    assert len(set(wire.TIER_NUMBERS.values())) == len(TierId)


def test_defaults_of_a_format() -> None:
    message = types_pb2.BlockFormat(
        layers=1, kv_heads=1, head_dim=8, dtype="float32", block_tokens=16
    )
    assert wire.decode_format(message) == BlockFormat(1, 1, 8, "float32", 16)


@pytest.mark.parametrize("group", ["sparse", "FULL"])
def test_an_unknown_group_kind(group: str) -> None:
    with pytest.raises(InvalidRequest, match=group):
        wire.decode_format(types_pb2.BlockFormat(group=group))


def test_what_a_newer_daemon_says() -> None:
    found = wire.decode_found(
        cache_pb2.GroupFound(
            block_count=1,
            runs=[types_pb2.TierRun(tier=77, block_count=1)],  # type: ignore[arg-type]
            reason=99,  # type: ignore[arg-type]
        )
    )
    assert (found.runs[0].tier, found.reason) == (TierId.SSD, Reason.NONE)


def test_half_a_number() -> None:
    with pytest.raises(InvalidRequest):
        wire.unpack_u32(b"12345")


def _subclasses(kind: type[KvTierError]) -> list[type[KvTierError]]:
    below = [s for child in kind.__subclasses__() for s in _subclasses(child)]
    # Those of the wire; a command may have errors of its own, which never travel.
    return [kind, *(s for s in below if s.__module__ == "kvtier.errors")]


@pytest.mark.parametrize("kind", _subclasses(KvTierError))
def test_errors_keep_their_class(kind: type[KvTierError]) -> None:
    status = wire.abort_status(kind("why"))
    assert status.code.name == kind.grpc_code
    reason = wire._reason_in(status.trailing_metadata)
    error = wire.error_of(reason, status.details)
    assert (type(error), str(error)) == (kind, "why")


def test_importing_wire_leaves_grpc_alone() -> None:
    code = "import sys, kvtier.wire; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
