"""Stage 2: train on a token store, into checkpoints and an adapter or a model.

Read `loop.py` first: what every worker does, step by step. `trainer.py` is the driver's side and
`config.py` the settings; the packages below hold the engines, checkpoints, orchestration on Ray,
monitoring and the memory estimate.
"""
