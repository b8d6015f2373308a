"""DECIDES. Pure and synchronous: no asyncio, clock, threads, I/O. The only writer of block state.

`Ledger` (ledger.py) is the whole public face; below it, in the order to read: `slots.py`
(segments and slots of a tier), `chain.py` (runs and namespaces), `chains.py` (the prefix forest),
`index.py` (where a key is), `search.py` (longest prefix), `moves.py` (what must move),
`policy.py` (who goes first).
"""
