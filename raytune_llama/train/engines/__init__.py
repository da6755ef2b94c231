"""Training engines (DDP, FSDP2, DeepSpeed ZeRO) behind one protocol; none of them knows Ray.

Read `protocol.py` first. `build.py` chooses the engine that a config asks for; `config.py` and
`optimizer.py` hold the settings that the engines share.
"""
