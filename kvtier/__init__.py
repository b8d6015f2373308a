"""kvtier: a per-node daemon that owns the KV cache of LLM engines.

Importing this package loads nothing else: no grpc, torch, cupy, lmdb or native library. Ask for
what you need: `kvtier.client`, `kvtier.connectors.<engine>`, `kvtier.config`.
"""

__version__ = "0.1.0"
