"""Files and folders on local disks and in object storage, and locks on run directories.

Read `place` first: a `Place` is a path or a URL. `transfers` publishes folders and keeps local
copies, and `lease` locks a run directory for one driver. `files` has atomic writes on local disks,
and `hashes` the content hashes of manifests.
"""
