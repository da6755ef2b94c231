"""Stage 1: text corpora or conversations to a token store, and from the store to training batches.

`readers` parse source files, `filters` clean and deduplicate texts, `build` encodes them on Ray,
`store` holds the result, and `batches` reads it for training. Start with `build/preparation.py`.
"""
