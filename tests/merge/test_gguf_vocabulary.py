"""Promise: llama.cpp splits text as the tokenizer does, or the tokenizer is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import TokenType
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raytune_llama.merge.gguf_vocabulary import LLAMA_3_PATTERN, read_vocabulary
from tests.conftest import CONTROL_TOKENS, train_tokenizer

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
ONLY_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    engine = json.loads((folder / "tokenizer.json").read_text())
    change(engine)
    (folder / "tokenizer.json").write_text(json.dumps(engine))


def put_steps(folder: Path, *steps: Any) -> None:  # noqa: ANN401
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.save(str(folder / "tokenizer.json"))


def test_pieces_keep_scores_and_kinds(tmp_path: Path, add_pieces: Callable[[Path], None]) -> None:
    add_pieces(tmp_path)
    found = read_vocabulary(tmp_path, 410)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert found.model == "llama"
    assert found.tokens[:360] == [pieces.id_to_piece(id_) for id_ in range(360)]
    assert found.scores is not None
    assert found.scores[:360] == [pieces.get_score(id_) for id_ in range(360)]
    assert found.types[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert found.types.count(TokenType.BYTE) == 256
    assert found.types[360:] == [TokenType.UNUSED] * 50
    assert len(set(found.tokens)) == 410
    assert found.ids == {"bos": 1, "eos": 2, "unk": 0}
    assert (found.adds_bos, found.adds_eos, found.adds_space) == (True, False, True)


def test_byte_pairs_keep_merges_and_control_tokens(tmp_path: Path) -> None:
    folder = train_tokenizer(tmp_path)
    found = read_vocabulary(folder, 410)
    engine = json.loads((folder / "tokenizer.json").read_text())
    assert (found.model, found.pre) == ("gpt2", "gpt-2")
    assert found.merges == [" ".join(pair) for pair in engine["model"]["merges"]]
    for token, id_ in engine["model"]["vocab"].items():
        assert found.tokens[id_] == token
        wanted = TokenType.CONTROL if token in CONTROL_TOKENS else TokenType.NORMAL
        assert found.types[id_] == wanted
    assert (found.adds_bos, found.adds_eos) == (False, False)
    assert found.scores is None


def test_template_and_text_that_was_added_are_kept(tmp_path: Path) -> None:
    folder = train_tokenizer(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["hello world"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    found = read_vocabulary(folder, 410)
    assert found.template == "{{ messages[0]['content'] }}"
    assert found.types[found.tokens.index("hello world")] == TokenType.USER_DEFINED


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        ([pre_tokenizers.Digits(individual_digits=True), BYTES], False, "smollm"),
        (
            [pre_tokenizers.Split(Regex(LLAMA_3_PATTERN), "isolated"), ONLY_BYTES],
            True,
            "llama-bpe",
        ),
    ],
)
def test_pre_tokenizer_is_named_as_llama_cpp_does(
    tmp_path: Path, steps: list[Any], name: str, *, ignore_merges: bool
) -> None:
    folder = train_tokenizer(tmp_path)
    put_steps(folder, *steps)
    rewrite(folder, lambda engine: engine["model"].update(ignore_merges=ignore_merges))
    assert read_vocabulary(folder, 410).pre == name
    rewrite(folder, lambda engine: engine["model"].update(ignore_merges=not ignore_merges))
    with pytest.raises(ValueError, match=r"llama\.cpp knows gpt-2, smollm, llama-bpe"):
        read_vocabulary(folder, 410)


@pytest.mark.parametrize(
    "steps",
    [
        [pre_tokenizers.Digits(individual_digits=False), BYTES],
        [pre_tokenizers.Split(Regex(r"\s+"), "isolated"), ONLY_BYTES],
        [pre_tokenizers.ByteLevel(add_prefix_space=True)],
        [pre_tokenizers.Metaspace()],
    ],
    ids=str,
)
def test_unknown_pre_tokenizer_is_refused_with_those_that_are_known(
    tmp_path: Path, steps: list[Any]
) -> None:
    folder = train_tokenizer(tmp_path)
    put_steps(folder, *steps)
    with pytest.raises(ValueError, match=r"llama\.cpp knows gpt-2, smollm, llama-bpe"):
        read_vocabulary(folder, 410)


def test_normalizer_is_refused(tmp_path: Path) -> None:
    folder = train_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="not a byte-level BPE without a normalizer"):
        read_vocabulary(folder, 410)


def test_pieces_that_merge_otherwise_are_refused(
    tmp_path: Path, add_pieces: Callable[[Path], None]
) -> None:
    add_pieces(tmp_path)
    from sentencepiece.sentencepiece_model_pb2 import (
        ModelProto,  # pyright: ignore[reportAttributeAccessIssue]  # made at import
    )

    file = tmp_path / "tokenizer.model"
    proto = ModelProto.FromString(file.read_bytes())
    proto.normalizer_spec.remove_extra_whitespaces = True
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match=r"no rule for the tokenizer\.model"):
        read_vocabulary(tmp_path, 410)
