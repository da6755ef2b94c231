"""Imports all that training does: for the process from which workers of tests are forked."""

# ruff: noqa: F401 - the environment comes before the imports, which are for later use.

import os

# As the engine sets it for workers on CPUs. Without it DeepSpeed might look for a GPU, and a CUDA
# that is initialized survives no fork.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed

import tests.train.group
