"""Generation of synthetic documents: seeds, the engine, other backends, and the shards they write."""
