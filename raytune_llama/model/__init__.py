"""What a LLaMA-family model is: weights, adapters, embeddings, loss. Imports no Ray.

Read `llama` first: its config, how a model is loaded, and the module that computes the loss.
`lora` attaches adapters, `tensors` and `directory` read and write weight files.
"""
