"""Imports all that training does: for the process from which workers of tests are forked."""

# ruff: noqa: F401 - the imports are for later use, and the environment comes before them.

import gc
import os

# As the engine sets it for workers on CPUs. Without it DeepSpeed might look for a GPU, and a CUDA
# that is initialized survives no fork.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed

import tests.train.group

# DeepSpeed collects garbage in each run of ZeRO 3: a third of a second, if among all that too.
gc.freeze()
