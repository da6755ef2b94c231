"""Vocabulary expansion: adds tokens learned from text to a tokenizer, and grows the model.

Start with `expansion.py` (the entry point); `sentencepiece_merge.py` and `byte_level.py` grow the
two kinds of tokenizer, `parity.py` checks the result and `fertility.py` measures it.
"""
