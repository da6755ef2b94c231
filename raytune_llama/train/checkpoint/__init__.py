"""Checkpoints: sharded safetensors files and a manifest, for any number of workers.

Read `layout.py` first: what a checkpoint is. `saver.py` writes one in the background, `restore.py`
finds the newest trusted one and loads it, `shards.py` reads and writes its files.
"""
