"""Checkpoints: sharded safetensors files and a manifest, for any number of workers.

Read `layout.py` first: it defines the format. `saver.py` writes a checkpoint in the background,
`restore.py` finds the newest intact one and loads it, `shards.py` reads and writes its files.
"""
