"""The client library: `Client` (blocking) and `AsyncClient`, same verbs.

    with Client() as client:
        space = client.open_namespace(model="my-model", format=BlockFormat(...))
        found = space.lookup(keys)
        with space.lease(keys[: found.block_count]) as lease:
            arrays = [numpy.frombuffer(view, numpy.uint8) for view in lease.views]

Importing this loads neither grpc nor torch nor numpy; grpc is loaded when a client is made.
"""

from kvtier.client.blocking import Client, Space
from kvtier.client.calls import GroupsFound, LeasedFound
from kvtier.client.client import AsyncClient, AsyncSpace
from kvtier.client.held import AsyncLease, AsyncReservation, Lease, Reservation
from kvtier.client.reservation import ReservedBlock

__all__ = [
    "AsyncClient",
    "AsyncLease",
    "AsyncReservation",
    "AsyncSpace",
    "Client",
    "GroupsFound",
    "Lease",
    "LeasedFound",
    "Reservation",
    "ReservedBlock",
    "Space",
]
