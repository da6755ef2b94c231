"""What a LLaMA-family model is: loading, adapters, vocabulary, loss. Imports no Ray."""
