"""Naming: which namespaces an SSD tier knows, their epochs and keys, in its file and its slabs.

    load: file, or else slabs -> unlock keys (new ones where they are wanted, rewrapped ones)
    register -> listed in each slab before the first block of it there
    set_epoch, purge: the file first, then every slab that lists it

Does not: know slots, or what a namespace is: descriptors are the caller's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from kvtier.errors import InvariantViolated, TierFailed
from kvtier.tiers.cipher import Keyring
from kvtier.tiers.files import Files
from kvtier.tiers.slab import Slab
from kvtier.tiers.state import Named, Names, NamespaceBook

logger = logging.getLogger(__name__)


class Naming:
    """Of one tier. Worker threads, one change at a time (it locks)."""

    def __init__(
        self, files: Files, directory: Path, slabs: Sequence[Slab], keyring: Keyring
    ) -> None:
        self.book = NamespaceBook(files, directory / "namespaces")
        self._directory = directory
        self._slabs = slabs
        self._keyring = keyring
        self._lock = threading.Lock()
        self._loaded = False

    @property
    def names(self) -> Names:
        """All that are known."""
        return self.book.names

    def unlock(self) -> None:
        """Takes keys into use, once the book and all slabs were read; from now on names may change.

        Raises:
            TierFailed: a key could not be stored. Call it again.
        """
        names = dict(self.names)
        for digest, named in self.names.items():
            names[digest] = self._keyed(digest, named)
        if names != self.names:
            self.book.save(names)
        for slab in self._slabs:
            listed = [(digest, named.key) for digest, named in slab.names.items() if named.key]
            rewrapped = {
                digest: names[digest] for digest, key in listed if key != names[digest].key
            }
            if rewrapped and slab.fd >= 0:
                with slab.lock:
                    before = slab.sync_failures
                    slab.list_names({**slab.names, **rewrapped})
                    slab.sync(before)
        if self._keyring.locked:
            logger.error(
                "%d namespaces are encrypted under another key: every lookup in them misses, their "
                "blocks stay; start with the right key (or the former one as "
                "encryption.key_file_previous), or purge them: %s",
                len(self._keyring.locked),
                ", ".join(sorted(digest.hex() for digest in self._keyring.locked)),
            )
        self._loaded = True

    def _keyed(self, digest: bytes, named: Named) -> Named:
        """As it is to be stored: with a key if that is wanted, wrapped by the master key of now."""
        key = named.key
        if not key and self._keyring.wanted(named.descriptor):
            if named.plain:
                logger.warning(
                    "namespace %s is encrypted from now on; what was written before is not: "
                    "`kvtier purge` would wipe it", digest.hex(),
                )  # fmt: skip
            key = self._keyring.make(digest)
        if not key:
            return named
        return named._replace(key=self._keyring.unlock(digest, key, plain=named.plain))

    def register(self, digest: bytes, descriptor: bytes, epoch: int) -> None:
        """Blocks of this namespace may be written from now on. Durable; a later epoch known wins.

        Raises:
            TierFailed: it is not registered.
        """
        self._must_be_loaded()
        with self._lock:
            known = self.names.get(digest)
            fresh = known or Named(epoch, descriptor, plain=False)
            named = self._keyed(digest, fresh._replace(epoch=max(fresh.epoch, epoch)))
            if not named.key:
                named = named._replace(plain=True)
            if named != known:
                self._save_or_forget(digest, named)

    def _save_or_forget(self, digest: bytes, named: Named) -> None:
        known = self.names.get(digest)
        try:
            self.book.save({**self.names, digest: named})
        except TierFailed:
            if known is None or named.key != known.key:
                self._keyring.forget(digest)
            raise

    def set_epoch(self, digest: bytes, epoch: int) -> None:
        """Blocks of older epochs never come back, also after a power cut.

        Raises:
            TierFailed: that cannot be promised (it may hold all the same).
            InvariantViolated: no such namespace is registered, or the epoch is older.
        """
        self._must_be_loaded()
        with self._lock:
            known = self.names.get(digest)
            if known is None or known.epoch > epoch:
                raise InvariantViolated(f"epoch {epoch} of {digest.hex()}: known is {known}")
            named = known._replace(epoch=epoch)
            self.book.save({**self.names, digest: named})
            for slab in self._slabs:
                with slab.lock:
                    if slab.names.get(digest, named).epoch < epoch:
                        before = slab.sync_failures
                        slab.list_names({**slab.names, digest: named})
                        slab.sync(before)

    def purge(self, digest: bytes, epoch: int) -> Named | None:
        """The namespace begins this epoch without a key: what was encrypted cannot be decrypted by
        anybody, and nothing comes back. Durable. Returns what it was; None: it was not known.

        Raises:
            TierFailed: that is not sure. Call it again.
        """
        self._must_be_loaded()
        with self._lock:
            known = self.names.get(digest)
            if known is None:
                return None
            named = Named(max(known.epoch, epoch), known.descriptor, plain=known.plain)
            self.book.save({**self.names, digest: named}, shred=True)
            self._keyring.forget(digest)
            for slab in self._slabs:
                with slab.lock:
                    if slab.fd >= 0 and slab.mentions(digest):
                        names = dict(slab.names)
                        if digest in names:
                            names[digest] = named
                        # Both copies of the list, one after the other: one is whole at any moment.
                        for _ in range(2):
                            before = slab.sync_failures
                            slab.list_names(names)
                            slab.sync(before)
            return known

    def scoured(self, digest: bytes) -> None:
        """No slot holds plaintext of the namespace any longer; nothing of it was written since its
        purge. Raises TierFailed: it is taken to be there still.
        """
        with self._lock:
            known = self.names[digest]
            self.book.save({**self.names, digest: known._replace(plain=False)})

    def current(self, digest: bytes) -> Named:
        """What a slab must list before a block of this namespace is written there.

        Raises:
            TierFailed: it is not registered, or its key is not known.
        """
        named = self.names.get(digest)
        if named is None:
            raise TierFailed(f"namespace {digest.hex()} is not registered")
        if bool(named.key) != (self._keyring.key_of(digest) is not None):
            raise TierFailed(f"namespace {digest.hex()} has another key: nothing is written of it")
        return named

    def _must_be_loaded(self) -> None:
        # A list of namespaces made without having read the old one would replace it.
        if not self._loaded:
            raise TierFailed(f"{self._directory} could not be read yet: no epoch can be set in it")
