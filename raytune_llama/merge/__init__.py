"""A base model and LoRA adapters to one model directory, Meta checkpoint or GGUF file, verified.

Read `merger` first, then `plan` (what becomes of each weight) and `adapter` (the formula). `proof`
and `logits` verify what was written.
"""
