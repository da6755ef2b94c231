"""Tokenizers of the model's tests, for those of this folder."""

from tests.model.conftest import llama_tokenizer_dir, merged_tokenizer_dir, piece_model

__all__ = ["llama_tokenizer_dir", "merged_tokenizer_dir", "piece_model"]
