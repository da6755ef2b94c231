"""Estimates what a run will take, in steps, memory and disk, without loading weights.

Read `plan.py` first. `trace.py` follows one micro-batch on PyTorch's meta device, `schemes.py`
models each engine's buffers, `memory.py` adds both up, and `text.py` prints the plan.
"""
