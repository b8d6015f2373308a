"""One file per engine. The engine is imported lazily; every failure becomes a miss."""
