"""Token store on disk: memory-mapped Arrow shards and the manifest that describes them.

Start with `token_store.py`, which opens and reads a store; `manifest.py` defines the format, and
`shard_cache.py` copies shards from object storage to the local disk.
"""
