"""Files and folders, on a disk or in object storage, and who may write to them.

Read `place` first: a `Place` is a path or a URL. `transfers` publishes folders and keeps local
copies, and `lease` locks a run directory for one driver. `files` holds what is atomic on a local
disk.
"""
