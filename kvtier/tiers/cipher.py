r"""Cipher: keys of encrypted namespaces, and slots' bytes under them: AES-256-GCM.

    master key (key file or credential) --wraps--> data key of a namespace, kept beside its name
    data key + salt of a start --HKDF--> key of the slots of that start; nonce = generation

A nonce never meets a key twice: of one start no two writes have one generation, and of two starts
no two have one salt (128 random bits), whatever was lost, rolled back or rebuilt in between.

A wrapped key: 0 id of the master key 8 bytes, 8 nonce 12 bytes, 20 AES-GCM of the data key, 48
bytes; associated data: what it is, and the namespace's digest.

Does not: keep keys in files (state.py, slab.py), or choose which namespaces are encrypted.
"""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvtier.errors import BlockCorrupt, ConfigError, DeviceUnavailable, TierFailed
from kvtier.units import KIB

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES: Final = 32
SALT_BYTES: Final = 16
TAG_BYTES: Final = 16
WRAPPED_BYTES: Final = 68
_ID_BYTES: Final = 8
_NONCE_BYTES: Final = 12
_WRAPS: Final = b"kvtier data key 1 "
# The library keeps the interpreter's lock while it works: 0.1 ms at a time, then others get it.
_PIECE_BYTES: Final = 256 * KIB
_DERIVED_MAX: Final = 256  # starts of one namespace whose keys are kept

logger = logging.getLogger(__name__)


class MasterKey:
    """What wraps data keys. Any thread."""

    def __init__(self, secret: bytes) -> None:
        assert len(secret) == KEY_BYTES
        self.id = _derived(secret, b"", b"kvtier id of a master key")[:_ID_BYTES]
        self._aead = _aead(_derived(secret, b"", b"kvtier wraps data keys"))

    def wrap(self, digest: bytes, data_key: bytes) -> bytes:
        """The data key of this namespace as it may be stored."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return self.id + nonce + self._aead.encrypt(nonce, data_key, _WRAPS + digest)

    def unwrap(self, digest: bytes, wrapped: bytes) -> bytes | None:
        """The data key; None: this is not the master key that wrapped it, or it is damaged."""
        from cryptography.exceptions import InvalidTag

        if len(wrapped) != WRAPPED_BYTES or wrapped[:_ID_BYTES] != self.id:
            return None
        nonce = wrapped[_ID_BYTES : _ID_BYTES + _NONCE_BYTES]
        try:
            return self._aead.decrypt(nonce, wrapped[_ID_BYTES + _NONCE_BYTES :], _WRAPS + digest)
        except InvalidTag:
            return None


class DataKey:
    """Encrypts and decrypts the slots of one namespace. Any thread."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._derived: dict[bytes, bytes] = {}
        self._lock = threading.Lock()

    def seal(
        self, salt: bytes, generation: int, aad: bytes, source: int, target: int, size_bytes: int
    ) -> bytes:
        """Encrypts from one address to another; returns the tag."""
        context = self._gcm(salt, generation).encryptor()
        context.authenticate_additional_data(aad)
        _through(context, source, target, size_bytes)
        context.finalize()
        tag: bytes = context.tag
        return tag

    def open(
        self,
        salt: bytes,
        generation: int,
        aad: bytes,
        tag: bytes,
        source: int,
        target: int,
        size_bytes: int,
    ) -> None:
        """Decrypts from one address to another.

        Raises:
            BlockCorrupt: bytes, tag or associated data are not what was written; `target` is zero.
        """
        from cryptography.exceptions import InvalidTag

        context = self._gcm(salt, generation).decryptor()
        context.authenticate_additional_data(aad)
        _through(context, source, target, size_bytes)
        try:
            context.finalize_with_tag(tag)
        except InvalidTag:
            ctypes.memset(target, 0, size_bytes)
            raise BlockCorrupt("the tag of an encrypted slot is wrong") from None

    def _gcm(self, salt: bytes, generation: int) -> Any:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        with self._lock:
            key = self._derived.get(salt)
            if key is None:
                if len(self._derived) >= _DERIVED_MAX:
                    self._derived.clear()
                key = self._derived[salt] = _derived(self._secret, salt, b"kvtier slots")
        nonce = generation.to_bytes(_NONCE_BYTES, "little")
        return Cipher(algorithms.AES(key), modes.GCM(nonce))


class Keyring:
    """The master keys given, and the data keys of namespaces that could be unwrapped. Any thread.

    `wanted(descriptor)` says whether a namespace is to be encrypted; it may be replaced. `salt` is
    that of this start. `locked`: digests of namespaces whose key no master key here unwraps;
    `plain`: of those that have a key and may have slots from before they had it.
    """

    def __init__(
        self,
        master: bytes | None = None,
        previous: bytes | None = None,
        *,
        wanted: Callable[[bytes], bool] = lambda _: False,
    ) -> None:
        self.wanted = wanted
        self.salt = secrets.token_bytes(SALT_BYTES)
        self.locked: set[bytes] = set()
        self.plain: set[bytes] = set()
        self._master = MasterKey(master) if master is not None else None
        self._previous = MasterKey(previous) if previous is not None else None
        self._keys: dict[bytes, DataKey] = {}

    def key_of(self, digest: bytes) -> DataKey | None:
        """What the namespace's slots are written with; None: they are not encrypted."""
        return self._keys.get(digest)

    def may_be_plain(self, digest: bytes) -> bool:
        """Whether slots of this encrypted namespace that are not encrypted count."""
        return digest in self.plain

    def make(self, digest: bytes) -> bytes:
        """A new data key for the namespace, wrapped: store it, then `unlock` it.

        Raises:
            TierFailed: there is no master key. Nothing of the namespace may be written.
        """
        if self._master is None:
            raise TierFailed(
                f"namespace {digest.hex()} is to be encrypted and the daemon was started without a "
                "key: set encryption.key_file and restart"
            )
        return self._master.wrap(digest, secrets.token_bytes(KEY_BYTES))

    def unlock(self, digest: bytes, wrapped: bytes, *, plain: bool) -> bytes:
        """Takes the namespace's data key into use, if a master key unwraps it; else it is `locked`.
        Returns it wrapped by the master key of now, for the caller to store where that differs.
        """
        self.forget(digest)
        if plain:
            self.plain.add(digest)
        for master in (self._master, self._previous):
            data_key = master.unwrap(digest, wrapped) if master is not None else None
            if data_key is not None:
                self._keys[digest] = DataKey(data_key)
                if master is self._master or self._master is None:
                    return wrapped
                return self._master.wrap(digest, data_key)
        self.locked.add(digest)
        return wrapped

    def forget(self, digest: bytes) -> None:
        """The namespace has no data key any longer."""
        self._keys.pop(digest, None)
        self.locked.discard(digest)
        self.plain.discard(digest)

    def __repr__(self) -> str:
        return f"<Keyring of {len(self._keys)} data keys, {len(self.locked)} locked>"


def read_key(path: Path, *, is_guarded: bool = False) -> bytes:
    """A master key: a file of 32 bytes, or of 64 hexadecimal digits, that others cannot read
    (`is_guarded`: as its directory sees to).

    Raises:
        ConfigError: it cannot be read, others can read it, or it is no key.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(4 * KIB)
    except OSError as error:
        raise ConfigError(f"encryption key {path}: {error.strerror}") from error
    if mode & 0o077 and not is_guarded:
        raise ConfigError(
            f"encryption key {path} has mode {mode & 0o777:04o}: others may read or write it; "
            f"chmod 600 {path}, and consider making a new key"
        )
    if len(content) == KEY_BYTES:
        return content
    try:
        key = bytes.fromhex(content.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"encryption key {path} is neither {KEY_BYTES} bytes nor {2 * KEY_BYTES} hexadecimal "
            f"digits: openssl rand -out {path} {KEY_BYTES}"
        )
    return key


def require_library() -> None:
    """Raises DeviceUnavailable where `cryptography` is not installed."""
    try:
        import cryptography  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise DeviceUnavailable(
            "encryption is configured and the library is not installed: pip install "
            f"'kvtier[crypto]' ({error})"
        ) from error


def _aead(key: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)


def _derived(secret: bytes, salt: bytes, purpose: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    hkdf = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt or None, info=purpose)
    key: bytes = hkdf.derive(secret)
    return key


def _through(context: Any, source: int, target: int, size_bytes: int) -> None:
    for at in range(0, size_bytes, _PIECE_BYTES):
        count = min(_PIECE_BYTES, size_bytes - at)
        context.update_into(_view(source + at, count), _view(target + at, count))


def _view(address: int, size_bytes: int) -> memoryview:
    return memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B")
