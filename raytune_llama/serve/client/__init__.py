"""A client for any OpenAI-compatible endpoint, and the terminal chat built on it.

Read `endpoint` first: it lists models and streams chat completions. `terminal` is the chat that
`raytune chat` runs.
"""
