"""Stage 1: build a token store from text or conversations, and read training batches from it.

`readers` parse source files, `filters` clean and deduplicate texts, `build` encodes them on Ray,
`store` holds the result, and `batches` reads it for training. Start with `build/preparation.py`.
"""
