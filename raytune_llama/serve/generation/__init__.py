"""From a request to its output: template, tokenization, the engine's call, detokenization.

It knows tokens and no HTTP. Read `completion` first; `output` defines the deltas that are streamed,
`streams` finds stop strings and tool calls in them.
"""
