"""Rules: what the configuration's `[[namespaces]]` say of a namespace.

Does not: encrypt (tiers/cipher.py) or drop anything (ageing.py).
"""

from __future__ import annotations

from collections.abc import Callable

from kvtier.block import NamespaceSpec
from kvtier.config import Config
from kvtier.errors import KvTierError


def encrypted_by(config: Config) -> Callable[[bytes], bool]:
    """Whether a namespace of this descriptor is to be encrypted. What cannot be read is not."""

    def wanted(descriptor: bytes) -> bool:
        try:
            spec = NamespaceSpec.from_json(descriptor)
        except (KvTierError, TypeError, ValueError, KeyError):
            return False
        return config.rule(spec.tenant, spec.model).encrypt

    return wanted
