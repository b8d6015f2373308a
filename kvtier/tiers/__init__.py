"""KEEPS bytes: arenas, slab files and their catalogue. Knows neither the ledger nor the loop."""
