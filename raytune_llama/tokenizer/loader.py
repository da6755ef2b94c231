"""Load a tokenizer, identify it by its content, and encode text without matching control tokens.

One library per tokenizer directory, its *reference*, defines the ids of a text:

- SentencePiece if there is a `tokenizer.model`: the ids that LLaMA was trained with. A
  `tokenizer.json` beside it is a conversion, whose ids differ where pieces have equal scores
  (such as all pieces merged into a vocabulary with score 0) and before a leading space.
- `tokenizers` if there is only a `tokenizer.json`, or if plain-text tokens were added that
  `tokenizer.model` does not contain.
"""

import json
import logging
import shutil
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from raytune_llama.config.errors import UserError
from raytune_llama.storage.hashes import hash_bytes, hash_key
from raytune_llama.tokenizer.reference import (
    ReferenceEncoder,
    SentencePieceReference,
    TokenizersReference,
    is_sentencepiece,
)

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
"""A directory holds a tokenizer if it has one of these files; its settings are in other files."""

TOKENIZER_JSON_SECTIONS = ("added_tokens", "normalizer", "pre_tokenizer", "model")
"""Sections of a tokenizer.json that determine the ids of a text."""

_MODEL_FILE = "tokenizer.model"
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pth", ".pt", ".gguf"})


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a local directory, cached until its files change.

    Use it for token names, ids and templates; encode with `encode_text` or an encoder, because
    calling the tokenizer bypasses the reference. Callers share the object: copy it to modify it.

    Raises:
        ValueError: `path` holds no tokenizer file, lacks the settings for splitting text, or holds
            two tokenizers that disagree.
    """
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"tokenizer: {path} contains none of {', '.join(TOKENIZER_FILES)}; "
            "use a directory written by a tokenizer's save_pretrained"
        )
    return _load(path.absolute(), _file_state(path))


def _file_state(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Return name, mtime and size of each file of a directory except the weights."""
    stats = [(file, file.stat()) for file in sorted(path.iterdir()) if file.is_file()]
    return tuple(
        (file.name, stat.st_mtime_ns, stat.st_size)
        for file, stat in stats
        if file.suffix not in _WEIGHT_SUFFIXES
    )


@lru_cache(maxsize=8)
def _load(
    path: Path,
    state: tuple[tuple[str, int, int], ...],  # noqa: ARG001  # part of the cache key
) -> PreTrainedTokenizerFast:
    file = path / _MODEL_FILE
    is_pieces = file.is_file() and is_sentencepiece(file.read_bytes())
    if file.is_file() and not is_pieces and not (path / "tokenizer.json").is_file():
        # transformers would guess the pattern and the control tokens.
        raise UserError(
            f"tokenizer: {file} is not a SentencePiece model, and no tokenizer.json is beside it; "
            "if it is Meta's file of a LLaMA 3, use the directory that raytune convert-weights "
            "writes from Meta's, else fetch it again"
        )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    # Only tokenizer.json holds the normalization; without it, the class must define it. The generic
    # class defines none and silently produces wrong ids for LLaMA's tokenizer.model.
    if type(tokenizer) is PreTrainedTokenizerFast and not (path / "tokenizer.json").is_file():
        raise UserError(
            f"tokenizer: {path} has no tokenizer.json, and its tokenizer_config.json sets no "
            "tokenizer_class that defines how text is split; add the model's class, for LLaMA "
            '{"tokenizer_class": "LlamaTokenizer"}'
        )
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(  # the directory is wrong, not an argument's type
            f"tokenizer: {path} loads as {type(tokenizer).__name__}, not as a fast tokenizer; "
            "use a directory with a tokenizer.json"
        )
    if is_pieces:
        _check_agreement(tokenizer, file)
        tokenizer.vocab_file = str(file)
    else:
        # Another format under the same name: tokenizer.json defines the tokenizer.
        tokenizer.vocab_file = None
    return tokenizer


def _check_agreement(tokenizer: PreTrainedTokenizerFast, file: Path) -> None:
    """Reject a directory whose tokenizer.model maps ids to other tokens than its other files do."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    names = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    controls = control_token_ids(tokenizer)
    # Names of control tokens may differ: a template may rename a reserved piece.
    other = [
        id_
        for id_ in range(len(pieces))
        if names.get(id_) != pieces.id_to_piece(id_)
        and not (id_ in controls or pieces.is_control(id_) or pieces.is_unknown(id_))
    ]
    if other:
        raise UserError(
            f"tokenizer: {file.parent} holds two tokenizers: {len(other)} of {len(pieces)} ids of "
            f"{_MODEL_FILE} are other tokens in its other files, the first is {other[0]}, "
            f"{pieces.id_to_piece(other[0])!r} against {names.get(other[0])!r}; remove "
            "the tokenizer that the model was not trained with"
        )


def control_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that represent no text and that encoding a text must never produce."""
    # Not `all_special_ids`: it also lists SentencePiece's user-defined pieces, which are text.
    added = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return frozenset(added | {id_ for id_ in named if isinstance(id_, int)})


def control_token_strings(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the spellings of the control tokens, as a template writes them."""
    return frozenset(tokenizer.convert_ids_to_tokens(sorted(control_token_ids(tokenizer))))


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that transformers' `tokenizer(text)` puts before a text: BOS, or none.

    It depends on the post-processor in the tokenizer's files, not on whether a BOS token exists.
    """
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, is_added = encoded["input_ids"], encoded["special_tokens_mask"]
    return tuple(ids[: is_added.index(0)])


def token_texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the text of each token except control tokens, in the order of their ids."""
    controls = control_token_ids(tokenizer)
    ids = sorted(set(tokenizer.get_vocab().values()) - controls)
    return tokenizer.backend_tokenizer.decode_batch([[id_] for id_ in ids])


def load_reference_encoder(path: Path) -> ReferenceEncoder:
    """Load the reference encoder of a tokenizer directory.

    Raises:
        ValueError: As `load_tokenizer`.
    """
    return build_reference_encoder(load_tokenizer(path))


def build_reference_encoder(tokenizer: PreTrainedTokenizerFast) -> ReferenceEncoder:
    """Return the reference encoder of a tokenizer from `load_tokenizer`."""
    pieces = _pieces_of(tokenizer)
    if pieces is not None:
        return pieces
    return TokenizersReference(tokenizer.backend_tokenizer.to_str())


def _pieces_of(tokenizer: PreTrainedTokenizerBase) -> SentencePieceReference | None:
    """Return the SentencePiece reference of a tokenizer, None if `tokenizers` is its reference."""
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
            "%s does not contain %d tokens added as plain text (%r ...): encoding with tokenizers, "
            "whose ids differ from SentencePiece's where pieces have equal scores",
            file,
            len(unknown),
            unknown[0],
        )
        return None
    return pieces


@lru_cache(maxsize=4)
def _load_pieces(
    file: Path,
    state: tuple[int, int],  # noqa: ARG001  # part of the cache key
    controls: frozenset[int],
) -> SentencePieceReference:
    return SentencePieceReference(file.read_bytes(), controls)


def reference_name(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the library that defines the ids of a tokenizer from `load_tokenizer`."""
    return "tokenizers" if _pieces_of(tokenizer) is None else "sentencepiece"


def hash_tokenizer(path: Path, like: str | None = None) -> str:
    """Hash everything that determines the ids of documents, including BOS and EOS.

    The hash covers the loaded tokenizer, not its files: settings in tokenizer_config.json change
    ids too, and saving a tokenizer again keeps its hash. It includes the choice of reference,
    SentencePiece or tokenizers.

    Args:
        path: Directory of the tokenizer.
        like: Recorded hash whose algorithm to use; see `storage.hashes`.
    """
    return _cached_hash(path.absolute(), _file_state(path), like)


@lru_cache(maxsize=8)
def _cached_hash(
    path: Path,
    state: tuple[tuple[str, int, int], ...],  # noqa: ARG001  # part of the cache key
    like: str | None,
) -> str:
    return hash_bytes(_content(load_tokenizer(path), like), like)


def _content(tokenizer: PreTrainedTokenizerFast, like: str | None) -> bytes:
    """Return everything that determines the ids of documents, as JSON."""
    engine = json.loads(tokenizer.backend_tokenizer.to_str())
    content = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    if _pieces_of(tokenizer) is not None:
        model = Path(tokenizer.vocab_file).read_bytes()
        content["sentencepiece"] = hash_bytes(model, like)
        content["added_tokens"] = engine["added_tokens"]
    else:
        content |= {name: engine[name] for name in TOKENIZER_JSON_SECTIONS}
    return json.dumps(content, sort_keys=True).encode()


def fingerprint_tokenizer(path: Path) -> dict[str, str]:
    """Return what determines the ids of a token store: the reference, its version and content hash.

    The fast engine is not included: it is used only where its ids are the reference's.
    """
    return fingerprint_loaded(load_tokenizer(path))


def fingerprint_loaded(
    tokenizer: PreTrainedTokenizerFast, like: str | None = None
) -> dict[str, str]:
    """Return the `fingerprint_tokenizer` of a tokenizer from `load_tokenizer`.

    Args:
        tokenizer: The tokenizer.
        like: Fingerprint of the store to compare with, whose algorithm to use; None: a new store.
    """
    name = reference_name(tokenizer)
    found = hash_bytes(_content(tokenizer, like), like)
    return {"reference": name, "version": version(name), hash_key("hash", like): found}


def write_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of directory `path` into an existing `folder`, with its reference.

    `save_pretrained` alone does not copy tokenizer.model, which defines the ids of its training.
    """
    load_tokenizer(path).save_pretrained(folder)
    if (path / _MODEL_FILE).is_file():
        shutil.copyfile(path / _MODEL_FILE, folder / _MODEL_FILE)


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Encode texts as plain text with the reference: control tokens written in them stay text.

    The tokenizer must come from `load_tokenizer`: the ids are those of `load_reference_encoder` on
    its directory. No special tokens are added.
    """
    pieces = _pieces_of(tokenizer)
    if pieces is not None:
        return [ids.tolist() for ids in pieces.encode(texts)]
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
    return encoded["input_ids"]
