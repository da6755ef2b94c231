"""A token store from a config and a tokenizer, as a job builds it."""

from pathlib import Path

from raytune_llama.data.build.preparation import open_data, prepare_data
from raytune_llama.data.config import AnyDataConfig
from raytune_llama.data.store.token_store import TokenStore


def build_store(config: AnyDataConfig, tokenizer: Path) -> TokenStore:
    return prepare_data(config, open_data(config, tokenizer))
