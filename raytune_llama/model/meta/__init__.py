"""Conversion between Meta's original checkpoint format and model directories of transformers.

Read `layout` first: the weights' names, shards and row order in both formats. `from_meta` and
`to_meta` are the two directions, and `conversion` is what the job calls. `params_file` reads
params.json; `tokenizer_files`, `tiktoken_file` and `llama3` know the tokenizers.
"""
