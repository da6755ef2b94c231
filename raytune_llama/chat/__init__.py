"""Conversations to token ids and a mask of the tokens to be learned.

Read `conversations` first, then `encoding`. `formats` parses rows of data sets, `templates`
renders prompts, and `spans` finds where an answer begins among the ids.
"""
