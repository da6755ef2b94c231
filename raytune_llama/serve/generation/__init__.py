"""From a request to its output: chat template, tokenization, engine call, detokenization.

Knows tokens, not HTTP. Read `completion` first; `output` defines the deltas that are streamed,
`streams` finds stop strings and tool calls in them.
"""
