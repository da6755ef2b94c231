"""Hyperparameter sweeps: a search space to the config of the best run.

Read `config`, then `sweep`. `journal` is the state of a sweep on disk, `space` and `search` draw
the samples, and `trial` runs one training run under Ray Tune.
"""
