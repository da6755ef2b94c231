"""Chat templates: render a conversation as segments of text and control tokens.

Read `segments` first: the `Template` protocol. `tokenizer` runs a tokenizer's own Jinja template,
`plain` is for prompts in plain text (Alpaca, BELLE, LLaMA 2), and `choice` builds a template from
its name. `options` are values of the variables that a template reads.
"""
