"""Text to token ids, exactly as the reference tokenizer defines them. Imports no Ray.

Read `reference` first: the `TextEncoder` protocol and the encoders that define the ids. `loader`
opens a tokenizer's directory, and `selection` picks the fastest encoder that gives the same ids.
"""
