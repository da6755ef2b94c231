"""Tokenizers in the forms that LLaMA-family models come with, and conversations to encode."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.conversations import Conversation, Role, Turn
from raytune_llama.tokenizer.loader import load_tokenizer
from tests.model.conftest import NAMES_LLAMA, piece_model

__all__ = ["piece_model"]  # a fixture that tests of this folder take by its name

CHATML = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
"""A chat template with headers, an end token of its own, and a line break behind it."""

LLAMA2_OWN = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% elif message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""A chat template that strips contents, begins answers with a space, and knows no system."""


def talk(*contents: str, system: str | None = None) -> Conversation:
    """A conversation of contents in turn, the user's first."""
    roles: tuple[Role, Role] = ("user", "assistant")
    turns = tuple(Turn(roles[number % 2], content) for number, content in enumerate(contents))
    return Conversation(turns, system)


_FRAGMENTS = ("\n", "\n\n", " ", "  ", "a", "fox", "</s>", "<s>", "<|im_end|>", "日报", "🙂", "é")

CONTENTS = st.lists(
    st.one_of(
        st.sampled_from(_FRAGMENTS),
        # U+2581 is how SentencePiece writes a space.
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0▁"), max_size=6),
    ),
    max_size=5,
).map("".join)
"""Contents: white space at the ends, control strings, characters of several bytes."""

ANSWERS = CONTENTS.filter(lambda text: bool(text.strip()))
"""Contents that an assistant may say."""

CONVERSATIONS = st.lists(st.tuples(CONTENTS, ANSWERS), min_size=1, max_size=3).map(
    lambda pairs: talk(*(content for pair in pairs for content in pair))
)
"""Conversations of one to three exchanges."""


@pytest.fixture(scope="session")
def byte_level(tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without SentencePiece, which has a chat template."""
    tokenizer = copy.deepcopy(load_tokenizer(tokenizer_dir))
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, piece_model: Path) -> PreTrainedTokenizerFast:
    """A tokenizer.model of LLaMA's kind."""
    folder = tmp_path_factory.mktemp("llama")
    shutil.copyfile(piece_model, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMES_LLAMA))
    return load_tokenizer(folder)
