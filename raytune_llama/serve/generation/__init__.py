"""From a request to its output: chat template, tokenization, engine call, detokenization.

Knows tokens, not HTTP. Read `completion` first; `output` defines the stream that it returns,
`detokenizer` turns tokens into text and finds stop strings and tool calls in it.
"""
