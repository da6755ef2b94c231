"""Load a tokenizer, identify it by its content, and encode text that can hold no control token.

Which ids a text gets is defined by one library for each directory, its *reference*:

- SentencePiece where there is a `loader.model`: LLaMA's ids, as training always made them. A
  `loader.json` beside it is a conversion, which gives other ids where pieces have equal scores
  (all that were merged into a vocabulary with score 0) and before a leading space.
- `tokenizers` where there is only a `loader.json`, or where plain text was added as tokens
  beside `loader.model`, of which SentencePiece knows nothing.
"""

import hashlib
import json
import logging
import shutil
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from raytune_llama.config.errors import UserError
from raytune_llama.tokenizer.reference import (
    ReferenceEncoder,
    SentencePieceReference,
    TokenizersReference,
    is_sentencepiece,
)

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
"""A directory with one of these holds a tokenizer; settings lie beside it."""

TOKENIZER_JSON_SECTIONS = ("added_tokens", "normalizer", "pre_tokenizer", "model")
"""The parts of a `tokenizers` engine that decide which ids a text gets."""

_MODEL_FILE = "tokenizer.model"
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pth", ".pt", ".gguf"})


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a local directory, once for as long as its files stay the same.

    For names, numbers and templates; ids come from `encode_text` or an encoder, since its own call
    knows nothing of the reference. Callers share the object: one that changes it copies it first.

    Raises:
        ValueError: `path` holds no tokenizer file, or not all that says how text is split, or two
            tokenizers that disagree.
    """
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"tokenizer: {path} holds none of {', '.join(TOKENIZER_FILES)}; "
            "name a directory saved by a tokenizer's save_pretrained"
        )
    return _load(path.absolute(), _file_state(path))


def _file_state(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Return name, time and size of each small file of a directory: all that a tokenizer reads."""
    stats = [(file, file.stat()) for file in sorted(path.iterdir()) if file.is_file()]
    return tuple(
        (file.name, stat.st_mtime_ns, stat.st_size)
        for file, stat in stats
        if file.suffix not in _WEIGHT_SUFFIXES
    )


@lru_cache(maxsize=8)
def _load(
    path: Path,
    state: tuple[tuple[str, int, int], ...],  # noqa: ARG001  # changed files are another tokenizer
) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    # Only tokenizer.json holds the normalization; without it a class has to know it. The generic
    # class knows none, and gives LLaMA's tokenizer.model other ids without a word.
    if type(tokenizer) is PreTrainedTokenizerFast and not (path / "tokenizer.json").is_file():
        raise UserError(
            f"tokenizer: {path} has no tokenizer.json and its tokenizer_config.json names no "
            "class that knows how text is split; write there the model's, for LLaMA "
            '{"tokenizer_class": "LlamaTokenizer"}'
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(  # the directory is wrong, not an argument's type
            f"tokenizer: {path} is a {type(tokenizer).__name__}, which has no tokenizer.json form; "
            "name a directory with a tokenizer.json"
        )
    file = path / _MODEL_FILE
    if file.is_file() and is_sentencepiece(file.read_bytes()):
        _check_agreement(tokenizer, file)
        tokenizer.vocab_file = str(file)
    else:
        # Another format under the same name: nothing but tokenizer.json can be meant.
        tokenizer.vocab_file = None
    return tokenizer


def _check_agreement(tokenizer: PreTrainedTokenizerFast, file: Path) -> None:
    """Refuse a directory whose tokenizer.model means other tokens by its ids."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    names = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    controls = control_token_ids(tokenizer)
    # The name of a control token is no text: a template may call a reserved piece as it likes.
    other = [
        id_
        for id_ in range(len(pieces))
        if names.get(id_) != pieces.id_to_piece(id_)
        and not (id_ in controls or pieces.is_control(id_) or pieces.is_unknown(id_))
    ]
    if other:
        raise UserError(
            f"tokenizer: {file.parent} holds two tokenizers: {len(other)} of {len(pieces)} ids of "
            f"{_MODEL_FILE} stand for other tokens in the rest of it, the first is {other[0]}, "
            f"{pieces.id_to_piece(other[0])!r} against {names.get(other[0])!r}; remove "
            "the one that the model was not trained with"
        )


def control_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that stand for no text: they may never come out of encoding a text."""
    # Not `all_special_ids`: that lists SentencePiece's user-defined pieces too, which are text.
    added = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return frozenset(added | {id_ for id_ in named if isinstance(id_, int)})


def control_token_strings(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return how the control tokens are spelled where a template writes them."""
    return frozenset(tokenizer.convert_ids_to_tokens(sorted(control_token_ids(tokenizer))))


def token_texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the text of each token that stands for text."""
    controls = control_token_ids(tokenizer)
    ids = sorted(set(tokenizer.get_vocab().values()) - controls)
    return tokenizer.backend_tokenizer.decode_batch([[id_] for id_ in ids])


def load_reference_encoder(path: Path) -> ReferenceEncoder:
    """Load what defines the ids of a tokenizer's directory.

    Raises:
        ValueError: as `load_tokenizer`.
    """
    return build_reference_encoder(load_tokenizer(path))


def build_reference_encoder(tokenizer: PreTrainedTokenizerFast) -> ReferenceEncoder:
    """Return what defines the ids of a tokenizer from `load_tokenizer`."""
    pieces = _pieces_of(tokenizer)
    if pieces is not None:
        return pieces
    return TokenizersReference(tokenizer.backend_tokenizer.to_str())


def _pieces_of(tokenizer: PreTrainedTokenizerBase) -> SentencePieceReference | None:
    """Return the reference of a tokenizer if it is SentencePiece."""
    file = getattr(tokenizer, "vocab_file", None)
    if file is None or Path(file).name != _MODEL_FILE:
        return None
    stat = Path(file).stat()
    controls = control_token_ids(tokenizer)
    pieces = _load_pieces(Path(file), (stat.st_mtime_ns, stat.st_size), controls)
    unknown = sorted(
        token.content
        for id_, token in tokenizer.added_tokens_decoder.items()
        if id_ not in controls and not pieces.is_user_defined(id_)
    )
    if unknown:
        logger.warning(
            "%s knows nothing of %d tokens that were added as plain text (%r ...): ids are those "
            "of tokenizers, which differ from SentencePiece's where pieces have equal scores",
            file,
            len(unknown),
            unknown[0],
        )
        return None
    return pieces


@lru_cache(maxsize=4)
def _load_pieces(
    file: Path,
    state: tuple[int, int],  # noqa: ARG001  # a changed file is another one
    controls: frozenset[int],
) -> SentencePieceReference:
    return SentencePieceReference(file.read_bytes(), controls)


def tokenizer_sha256(path: Path) -> str:
    """Hash what decides the ids of documents: what is loaded, and which ids begin and end them.

    What is loaded and not the files: settings in tokenizer_config.json change ids too, and a
    tokenizer that is only written again keeps its hash. Whether SentencePiece or tokenizers is
    the reference is a part of it.
    """
    return _sha256(load_tokenizer(path))


def _sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    engine = json.loads(tokenizer.backend_tokenizer.to_str())
    content = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    if _pieces_of(tokenizer) is not None:
        model = Path(tokenizer.vocab_file).read_bytes()
        content["sentencepiece"] = hashlib.sha256(model).hexdigest()
        content["added_tokens"] = engine["added_tokens"]
    else:
        content |= {name: engine[name] for name in TOKENIZER_JSON_SECTIONS}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint_tokenizer(path: Path) -> dict[str, str]:
    """Return what decides the ids of a token store: the reference, its version, the content's hash.

    A fast engine is no part of it: it is used only where its ids are the reference's.
    """
    return fingerprint_loaded(load_tokenizer(path))


def fingerprint_loaded(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """As `fingerprint_tokenizer`, of a tokenizer from `load_tokenizer`."""
    name = "tokenizers" if _pieces_of(tokenizer) is None else "sentencepiece"
    return {"reference": name, "version": version(name), "sha256": _sha256(tokenizer)}


def write_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of directory `path` into an existing `folder`, with its reference.

    `save_pretrained` alone leaves tokenizer.model behind, and with it the ids of its training.
    """
    load_tokenizer(path).save_pretrained(folder)
    if (path / _MODEL_FILE).is_file():
        shutil.copyfile(path / _MODEL_FILE, folder / _MODEL_FILE)


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Encode texts as plain text with the reference: control tokens written in them stay text.

    For a tokenizer from `load_tokenizer`: the ids are those of `load_reference` of its directory.
    No special tokens are added.
    """
    pieces = _pieces_of(tokenizer)
    if pieces is not None:
        return [ids.tolist() for ids in pieces.encode(texts)]
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
    return encoded["input_ids"]
