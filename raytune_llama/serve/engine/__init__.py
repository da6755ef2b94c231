"""Inference engines: token ids in, sampled tokens out, for many requests at a time.

Read `protocol` first. `loop` is our engine around a transformers model, with continuous batching
in `scheduler`, the slotted KV cache in `cache` and batched LoRA in `lora`; `vllm` talks to
vLLM, with `vllm_worker` in its process and adapters as `vllm_adapters`.
"""
