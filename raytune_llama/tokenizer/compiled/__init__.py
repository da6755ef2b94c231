"""The compiled BPE encoder: the reference's ids, several times faster.

Read `encoder` first. `tables` turns a tokenizer into arrays, and `kernel` is the Numba code that
reads them.
"""
