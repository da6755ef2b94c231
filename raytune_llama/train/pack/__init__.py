"""Packs: several LoRA runs train on one base model, in one forward and one backward pass.

On CPUs the base's layers compute slot by slot in these passes, on GPUs for all slots at once.

Each run of a pack has a slot: the training loop of a solo run in a thread of its own, with an
engine that hands its micro-batches to the pack. So configs, checkpoints, metrics and results are
those of a solo run.

Read `pack.py` first, which takes turns between the slots and computes what they hand in.
`shared_model.py` runs the micro-batches of all slots through the base, `engine.py` is a
slot's engine, `slot.py` its thread, and `checks.py` says what cannot be packed.
"""
