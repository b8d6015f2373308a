"""MOVES bytes: a bounded queue per route, run in worker threads, reported to the store."""
