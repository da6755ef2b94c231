"""LLaMA-family models: weights, adapters, embeddings, loss. Imports no Ray.

Read `llama` first: the model config, loading, and the module that computes the loss.
`adapter` reads adapters, `lora` attaches them, `tensors` and `directory` read and write weights.
"""
