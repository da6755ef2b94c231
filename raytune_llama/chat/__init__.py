"""Turn conversations into token ids and a mask of the tokens to train on.

Read `conversations` first, then `encoding`. `formats` parses dataset rows, `templates` renders
prompts, and `spans` finds where an answer begins among the ids. `prompts` joins what a template
can't express of a request.
"""
