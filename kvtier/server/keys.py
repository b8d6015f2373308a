"""Keys: the master keys that the configuration names, read once at start.

Does not: keep or log them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from kvtier.config import Config, EncryptionConfig
from kvtier.errors import ConfigError
from kvtier.rules import encrypted_by
from kvtier.tiers.cipher import Keyring, read_key, require_library


def open_keyring(config: Config, environ: Mapping[str, str] = os.environ) -> Keyring:
    """Without a key nothing is encrypted, and what was is locked.

    Raises:
        ConfigError: a key cannot be read, is none, or others can read it.
        DeviceUnavailable: a key is configured and the library `cryptography` is not installed.
    """
    given, previous = config.encryption, None
    if given.key_file is None and given.credential is None:
        return Keyring()
    require_library()
    if given.credential is not None:
        # The service manager guards its directory; what modes look like there is its affair.
        master = read_key(_credential(given, environ), is_guarded=True)
    else:
        assert given.key_file is not None
        master = read_key(given.key_file)
    if given.key_file_previous is not None:
        previous = read_key(given.key_file_previous)
    return Keyring(master, previous, wanted=encrypted_by(config))


def _credential(given: EncryptionConfig, environ: Mapping[str, str]) -> Path:
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise ConfigError(
            f"encryption.credential = {given.credential!r}: there is no $CREDENTIALS_DIRECTORY; "
            "the service needs LoadCredential= (or LoadCredentialEncrypted=)"
        )
    assert given.credential is not None
    return Path(directory, given.credential)
