"""Source files to rows of text or conversations: listing, format and encoding detection, parsing.

Everything streams in bounded memory; a row that cannot be used is reported as a `BadRow`, never
repaired. Start with `documents.py`, which reads one file or byte range; `rows.py` has its types.
"""
