"""What is in run directories: a list of runs, one in detail, two compared, and what may be deleted.

All of it is read from the files that jobs write; nothing is kept anywhere else. Read `entries`
first: it says what a directory is and in which state. `tree` reads folders with sizes and times,
`listing` finds entries, `lineage` links them by hash, `command` is `raytune runs`.
"""
