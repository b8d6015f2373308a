"""Every exception kvtier raises, with its gRPC status, its reason, and whether a retry can help.

Three kinds of wrong, never mixed:

- *operating*: a `KvTierError`; a client sees it with its gRPC code and what to do;
- *programmer*: `InvariantViolated` or `assert`; nobody catches it, the daemon stops;
- *environment at start-up*: a `KvTierError` whose `exit_status` the command returns.

Does not: map foreign exceptions. The file that calls a foreign library does that at its edge.
"""

from __future__ import annotations


class KvTierError(Exception):
    """Base of all errors a caller may see. Anything else that escapes is a bug.

    `reason` is the stable UPPER_SNAKE name sent as `google.rpc.ErrorInfo.reason`; `exit_status`
    is what a `kvtier` command returns when this error ends it.
    """

    grpc_code = "INTERNAL"
    reason = "INTERNAL"
    retryable = False
    exit_status = 1


class InvalidRequest(KvTierError):
    """The request itself is wrong (length, count, range, duplicate). Nothing was changed."""

    grpc_code = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"


class ConfigError(InvalidRequest):
    """The configuration names an unknown key, an impossible value or two that disagree."""

    reason = "CONFIG_INVALID"
    exit_status = 2


class NotFound(KvTierError):
    """The namespace, lease or reservation named does not exist (or no longer does)."""

    grpc_code = "NOT_FOUND"
    reason = "NOT_FOUND"


class Unauthenticated(KvTierError):
    """No session, a session that ended, or a token of nobody."""

    grpc_code = "UNAUTHENTICATED"
    reason = "SESSION_UNKNOWN"


class PermissionDenied(KvTierError):
    """The session exists but may not do this (uid not configured, other tenant, missing right)."""

    grpc_code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class ReservationExpired(KvTierError):
    """Commit after the reservation's deadline, abort or loss. Nothing was stored."""

    grpc_code = "FAILED_PRECONDITION"
    reason = "RESERVATION_EXPIRED"


class LeaseLost(KvTierError):
    """The lease was taken back or its session ended: what was read since may be other bytes."""

    grpc_code = "FAILED_PRECONDITION"
    reason = "LEASE_LOST"


class BlocksGone(KvTierError):
    """Evicted, or their namespace cleared, while the call worked on them: store them again."""

    grpc_code = "ABORTED"
    reason = "BLOCKS_GONE"
    retryable = True


class EpochEnded(KvTierError):
    """The namespace was cleared while the call worked on it: nothing was stored; store again."""

    grpc_code = "ABORTED"
    reason = "EPOCH_ENDED"
    retryable = True


class BlocksHeld(KvTierError):
    """Leased, so that they cannot be taken away now; the message says who. Nothing was changed."""

    grpc_code = "FAILED_PRECONDITION"
    reason = "BLOCKS_HELD"
    retryable = True


class VersionMismatch(KvTierError):
    """Client and daemon speak versions that do not meet."""

    grpc_code = "FAILED_PRECONDITION"
    reason = "VERSION_MISMATCH"
    exit_status = 3


class TierFull(KvTierError):
    """No room, and nothing may be evicted now (leased, pinned, reserved). No state was changed."""

    grpc_code = "RESOURCE_EXHAUSTED"
    reason = "TIER_FULL"
    retryable = True


class LimitReached(KvTierError):
    """A `_max` of the configuration was reached; the message names it. No state was changed."""

    grpc_code = "RESOURCE_EXHAUSTED"
    reason = "LIMIT_REACHED"
    retryable = True


class DeadlineExceeded(KvTierError):
    """The caller's deadline passed before the answer. What was asked did not happen."""

    grpc_code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"
    retryable = True


class DaemonUnavailable(KvTierError):
    """The daemon is not there, is draining, or went away during the call."""

    grpc_code = "UNAVAILABLE"
    reason = "DAEMON_UNAVAILABLE"
    retryable = True
    exit_status = 4


class BlockCorrupt(KvTierError):
    """Magic, identity, length or checksum is wrong. The copy is dropped, never served.

    `damage` says what of it, for counting: "header" (none, or not whole), "payload", "misplaced"
    (another block's, or another slot's), "stale" (an older writing of this block).
    """

    grpc_code = "DATA_LOSS"
    reason = "BLOCK_CORRUPT"

    def __init__(self, message: str = "", *, damage: str = "payload") -> None:
        super().__init__(message)
        self.damage = damage


class Unsupported(KvTierError):
    """This version of kvtier cannot do that; the message says what it can. Nothing was changed."""

    grpc_code = "UNIMPLEMENTED"
    reason = "UNSUPPORTED"


class TierFailed(KvTierError):
    """The tier's device or file failed (EIO, ENOSPC, short write). The copy is not there."""

    grpc_code = "UNAVAILABLE"
    reason = "TIER_FAILED"
    retryable = True


class DeviceUnavailable(KvTierError):
    """A configured device (memory, directory, GPU, NUMA node) is not usable on this machine."""

    grpc_code = "FAILED_PRECONDITION"
    reason = "DEVICE_UNAVAILABLE"
    exit_status = 5


class AlreadyRunning(KvTierError):
    """Another daemon holds the state directory. It was not disturbed."""

    grpc_code = "FAILED_PRECONDITION"
    reason = "ALREADY_RUNNING"
    exit_status = 6


class InvariantViolated(AssertionError):
    """kvtier's own books disagree. Not a KvTierError: nobody may catch it; the daemon stops."""


def by_reason(reason: str) -> type[KvTierError]:
    """The class whose `reason` this is, for turning an ErrorInfo back into an exception."""
    pending = [KvTierError]
    while pending:
        candidate = pending.pop()
        if candidate.reason == reason:
            return candidate
        pending.extend(candidate.__subclasses__())
    return KvTierError
