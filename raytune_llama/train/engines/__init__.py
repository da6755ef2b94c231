"""Training engines (DDP, FSDP2, DeepSpeed ZeRO) that implement one protocol, independent of Ray.

Read `protocol.py` first. `build.py` builds the engine of a config; `config.py` and `optimizer.py`
hold the settings that the engines share.
"""
