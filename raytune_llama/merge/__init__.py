"""Merge LoRA adapters into a base: a model directory, Meta checkpoint or GGUF file, verified.

Read `merger` first, then `plan` (how each weight is merged); the formula is in `model.adapter`.
`proof` and `logits` verify the written files.
"""
