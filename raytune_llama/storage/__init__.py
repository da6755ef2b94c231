"""Files and folders on local disks and in object storage, and locks on run directories.

Read `place` first: a `Place` is a path or a URL. `transfers` publishes folders and keeps local
copies, and `lease` locks a run directory for one driver. `files` has atomic writes on local disks,
and `hashes` the content hashes of manifests. `directories` finds models, tokenizers and adapters
wherever they are kept: `hub` on the Hugging Face Hub, `node_cache` in buckets.
"""
