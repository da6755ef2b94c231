"""LoRA adapters on top of one base model, loaded on demand and reloaded when their files change.

Read `pool` first: it decides which version a request uses and which adapters stay in memory.
`registry` lists and fetches them, `loading` checks them and reads their weights.
"""
