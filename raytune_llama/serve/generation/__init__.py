"""From a request to its output: chat template, tokenization, engine call, detokenization.

Knows tokens, not HTTP. Read `completion` first; `conversation` reads a request's messages, `output`
defines the stream that is returned, `detokenizer` turns tokens into text and finds stop strings and
tool calls in it.
"""
