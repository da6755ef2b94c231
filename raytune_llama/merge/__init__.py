"""Merge LoRA adapters into a base: a model directory, Meta checkpoint or GGUF file, verified.

Read `merger` first, then `plan` (how each weight is merged) and `adapter` (the formula). `proof`
and `logits` verify the written files.
"""
