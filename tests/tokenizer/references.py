"""References of every kind that cuts and the fast engine know, trained here."""

# ruff: noqa: RUF001  # Chinese text

import io
import json
import random
from collections.abc import Sequence

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue]  # made at import
)
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from raytune_llama.tokenizer.reference import (
    PieceProto,
    SentencePieceReference,
    TokenizersReference,
)

CORPUS = (
    "The quick brown fox jumps over the lazy dog; it's 2026, isn't it? We'll see 12345 of them.",
    "def f(x):\n    return {'a': x ** 2}\n\n\nfor index in range(10):\n\ttotal += index  # sum",
    "人民日报一九九八年一月一日。新年的钟声敲响了，全国人民欢度元旦！记者从会议上获悉：粮食产量创新高。",
    "哈哈哈哈，人民的人民日报的新年的钟声。ÅÉ naïve café — “quoted”… 한국어 ελληνικά",
)

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(_WORDS % digits), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, plain])


SPLITTERS = {
    "gpt2": _GPT2,
    "gpt2-digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
    "words-1": _words(""),
    "words-3": _words("{1,3}"),
}
"""How byte-level tokenizers split text: GPT-2's, SmolLM2's, Qwen's, LLaMA 3's."""


def byte_level(splitter: str, *, size: int = 700, normal_form: bool = False) -> Tokenizer:
    """Train a byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = SPLITTERS[splitter]
    tokenizer.decoder = decoders.ByteLevel()
    if normal_form:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def byte_level_reference(splitter: str, *, normal_form: bool = False) -> TokenizersReference:
    """The reference of a byte-level tokenizer."""
    return TokenizersReference(byte_level(splitter, normal_form=normal_form).to_str())


def pieces_proto(scores: dict[str, float], **spec: object) -> ModelProto:
    """A SentencePiece model of LLaMA's kind with the given pieces behind the 256 bytes."""
    proto = ModelProto()
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    for name, value in spec.items():
        setattr(proto.normalizer_spec, name, value)
    proto.pieces.add(piece="<unk>", type=PieceProto.UNKNOWN)
    for name in ("<s>", "</s>"):
        proto.pieces.add(piece=name, type=PieceProto.CONTROL)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", type=PieceProto.BYTE)
    for piece, score in scores.items():
        proto.pieces.add(piece=piece, score=score, type=PieceProto.NORMAL)
    return proto


def pieces_reference(scores: dict[str, float], **spec: object) -> SentencePieceReference:
    """The reference of `pieces_proto`."""
    return SentencePieceReference(pieces_proto(scores, **spec).SerializeToString(), frozenset())


def corpus_pieces(*, tied: bool, num: int = 500) -> dict[str, float]:
    """Pieces cut out of the corpus at random; tied ones all have score 0, as merged ones have."""
    chosen = random.Random(1)
    text = " ".join(CORPUS).replace(" ", "\u2581")
    characters = sorted({*text} - {"\n", "\t"})
    pieces = dict.fromkeys(characters)
    while len(pieces) < num:
        start = chosen.randrange(len(text))
        piece = text[start : start + chosen.randrange(2, 6)]
        # As trained ones, pieces hold no line break, a space at their beginning only, and letters
        # or signs.
        letters = {character.isalnum() for character in piece.removeprefix("\u2581")}
        if not {"\n", "\t"} & {*piece} and "\u2581" not in piece[1:] and len(letters) == 1:
            pieces[piece] = None
    return {piece: 0.0 if tied else -float(rank) for rank, piece in enumerate(pieces)}


def llama_json_reference() -> TokenizersReference:
    """The reference of LLaMA's tokenizer in the form of a tokenizer.json alone."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*dict.fromkeys(["<unk>", "<s>", "</s>", *bytes_, *corpus_pieces(tied=False)])]
    vocabulary = {piece: id_ for id_, piece in enumerate(pieces)}
    merges = [
        (piece[:at], piece[at:])
        for piece in pieces[259:]
        for at in range(1, len(piece))
        if piece[:at] in vocabulary and piece[at:] in vocabulary
    ]
    model = models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return TokenizersReference(tokenizer.to_str())


def metaspace_reference() -> TokenizersReference:
    """As `llama_json_reference`, in the form that transformers 5 writes."""
    tokenizer = Tokenizer.from_str(json.dumps(llama_json_reference().engine))
    tokenizer.normalizer = None  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return TokenizersReference(tokenizer.to_str())


def unigram_proto(sentences: Sequence[str]) -> bytes:
    """A unigram model, which merges nothing."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=written,
        vocab_size=400,
        model_type="unigram",
        byte_fallback=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()
