"""Expand a tokenizer, and the model that it belongs to, by tokens learned from text.

    expand_vocabulary(ExpandVocabConfig(model="llama", target="llama-zh", sources=(...)))

A tokenizer with a SentencePiece tokenizer.model gets pieces, trained here or given; a byte-level
one gets merges. Old tokens keep their ids and their rows in the model.
"""

import copy
import json
import logging
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import raytune_llama
from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, override, to_dict
from raytune_llama.data.readers.sources import check_sources
from raytune_llama.model.lineage import TOKENIZER_KEY
from raytune_llama.model.meta.layout import check_target
from raytune_llama.model.vocab import count_ids
from raytune_llama.storage.directories import fetch_directory, pin_directory, pin_source_fields
from raytune_llama.storage.files import (
    OUTPUT_MANIFEST,
    publish_directory,
    read_json,
    write_json_atomic,
)
from raytune_llama.storage.hashes import hash_file
from raytune_llama.storage.place import local_path
from raytune_llama.tokenizer.loader import (
    TOKENIZER_FILES,
    hash_tokenizer,
    load_reference_encoder,
    load_tokenizer,
)
from raytune_llama.tokenizer.reference import ReferenceEncoder, is_sentencepiece
from raytune_llama.vocabulary.byte_level import check_byte_level, grow_byte_level
from raytune_llama.vocabulary.config import (
    ExpandVocabConfig,
)
from raytune_llama.vocabulary.fertility import (
    Fertility,
    draw_fertility,
    measure_fertility,
    render_fertility,
)
from raytune_llama.vocabulary.model_growth import grow_model
from raytune_llama.vocabulary.parity import ParityReport, compare_libraries
from raytune_llama.vocabulary.samples import TextSample, first_texts, sample_documents
from raytune_llama.vocabulary.sentencepiece_merge import (
    check_base,
    merge_pieces,
    read_pieces,
    train_pieces,
)

logger = logging.getLogger(__name__)

FERTILITY_PLOT = "fertility.png"

_HELD_OUT = 0.02
_MEASURED_BYTES = 4 << 20
_OLD_BYTES = 32 << 20
_ROUNDS = 5
_EXAMPLE_CHARACTERS = 200
_PIECES = "tokenizer.model"
_CLASSES_OF_JSON = (None, "PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(slots=True)
class Expansion:
    """The result of an expansion, for the manifest."""

    kind: str
    """Kind of the new vocabulary entries: `pieces` or `merges`."""
    num_old_ids: int
    """Number of ids of the base's tokenizer."""
    num_ids: int = 0
    """Number of ids of the grown tokenizer."""
    added: dict[str, Any] = field(default_factory=dict)
    """Numbers of tokens added, and of tokens dropped by reason."""
    parity: dict[str, Any] | None = None
    """Comparison of SentencePiece's ids with tokenizers'; None for a byte-level tokenizer."""
    fertility: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Characters and tokens of held-out text, before and after, by kind of text."""


@dataclass(frozen=True)
class _ExpansionJob:
    """The inputs that all steps of an expansion share."""

    config: ExpandVocabConfig
    base: Path
    """Directory of the base."""
    grown: Path
    """Directory of the grown tokenizer."""
    sample: TextSample
    """Text in the new language."""
    old_text: TextSample
    """Text like that the base was trained on."""


def expand_vocabulary(config: ExpandVocabConfig) -> str:
    """Run the configured expansion; return the fertility table as text.

    Raises:
        ConfigError: A source or directory can't be used.
        SourceError: A file can't be read as configured.
        ValueError: The tokenizer is of a kind that can't be grown, the text is too short, or the
            model does not match it. Nothing is written then.
    """
    pinned = {"model": pin_directory(config.model, "model")}
    for name, sources in (("sources", config.sources), ("old_sources", config.old_sources)):
        pinned |= pin_source_fields((source.path for source in sources), name)
    config = override(config, pinned)
    base, target = fetch_directory(config.model, "model"), local_path(config.target, "target")
    _check_inputs(config, base, target)
    sample = sample_documents(config.sources, config.sample_mib << 20, held_out=_HELD_OUT)
    old_text = TextSample()
    if config.old_sources:
        old_text = sample_documents(config.old_sources, _OLD_BYTES, held_out=_HELD_OUT)
    expansion = Expansion(_kind(base), count_ids(load_tokenizer(base)))
    with tempfile.TemporaryDirectory() as name, publish_directory(target) as folder:
        grown = Path(name)
        job = _ExpansionJob(config, base, grown, sample, old_text)
        if expansion.kind == "pieces":
            _grow_pieces(job, expansion)
        else:
            _grow_merges(job, expansion)
        expansion.num_ids = count_ids(load_tokenizer(grown))
        table = _compare(job, expansion)
        (folder / FERTILITY_PLOT).write_bytes(draw_fertility(table))
        tensors: dict[str, str] = {}
        if (base / "config.json").is_file():
            tensors = grow_model(base, grown, folder, config.growth).tensors
        else:
            shutil.copytree(grown, folder, dirs_exist_ok=True)
        manifest = {
            "format": 1,
            "kind": "model" if tensors else "tokenizer",
            "raytune_llama": raytune_llama.__version__,
            "expanded": asdict(expansion) | {"inputs": _hash_inputs(config, base)},
            TOKENIZER_KEY: hash_tokenizer(grown),
            "tensors": tensors,
            "config": to_dict(config),
        }
        write_json_atomic(folder / OUTPUT_MANIFEST, manifest)
    logger.info("expanded from %d to %d ids: %s", expansion.num_old_ids, expansion.num_ids, target)
    return render_fertility(table)


def _check_inputs(config: ExpandVocabConfig, base: Path, target: Path) -> None:
    problems = check_sources(config.sources)
    if config.old_sources:
        problems += [f"old_{problem}" for problem in check_sources(config.old_sources)]
    try:
        load_tokenizer(base)
        if _kind(base) == "pieces":
            check_base((base / _PIECES).read_bytes(), f"model: {base / _PIECES}")
            _check_no_added_tokens(base)
        else:
            check_byte_level(_engine(base), f"model: {base}")
    except (ValueError, OSError) as error:
        problems.append(str(error) if str(error).startswith("model") else f"model: {error}")
    if config.pieces is not None:
        try:
            read_pieces(
                local_path(config.pieces, "pieces").read_bytes(), f"pieces: {config.pieces}"
            )
        except (ValueError, OSError) as error:
            problems.append(str(error) if "pieces:" in str(error) else f"pieces: {error}")
    try:
        check_target(target)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError(problems)


def _kind(base: Path) -> str:
    """Return the kind of entries that a tokenizer is grown by: `pieces` or `merges`."""
    file = base / _PIECES
    return "pieces" if file.is_file() and is_sentencepiece(file.read_bytes()) else "merges"


def _engine(base: Path) -> dict[str, Any]:
    return json.loads(load_tokenizer(base).backend_tokenizer.to_str())


def _check_no_added_tokens(base: Path) -> None:
    pieces = read_pieces((base / _PIECES).read_bytes(), str(base)).pieces
    num_ids = count_ids(load_tokenizer(base))
    if num_ids > len(pieces):
        raise UserError(
            f"model: {base} has {num_ids - len(pieces)} added tokens after its {len(pieces)} "
            "pieces, whose ids new pieces would take; start from the tokenizer without them"
        )


def _grow_pieces(job: _ExpansionJob, expansion: Expansion) -> None:
    """Write the grown tokenizer; drop pieces to which the two libraries give different ids."""
    config, base = job.config, (job.base / _PIECES).read_bytes()
    if config.pieces is not None:
        added = Path(config.pieces).read_bytes()
    else:
        added = train_pieces(job.sample.texts, config.training)
    texts = _some(job.sample) + _some(job.old_text)
    without: set[str] = set()
    num_rounds = 0
    while True:
        num_rounds += 1
        merged = merge_pieces(
            base,
            added,
            scores=config.scores,
            keep_ascii=config.keep_ascii,
            keep_unreachable=config.keep_unreachable,
            without=frozenset(without),
        )
        _write_pieces(job, merged.model)
        parity = compare_libraries(job.grown, texts)
        pieces = read_pieces(merged.model, _PIECES).pieces
        new = {pieces[id_].piece for id_ in parity.ids if merged.num_base <= id_ < len(pieces)}
        if config.scores == "tied" or not new or num_rounds == _ROUNDS:
            break
        without |= new
        logger.info(
            "dropped pieces whose ids differ between SentencePiece and tokenizers: %s", sorted(new)
        )
    expansion.added = {
        "tokens": merged.num_new,
        "left_out": merged.left_out,
        "unreachable": list(merged.unreachable),
        "differing": sorted(without),
    }
    logger.info(
        "added %d pieces; dropped, by reason: %s; %d candidates are unreachable by merging",
        *(merged.num_new, merged.left_out, len(merged.unreachable)),
    )
    _note_parity(parity, job.base, expansion)


def _some(sample: TextSample) -> list[str]:
    return list(first_texts(sample.held_out + sample.texts, _MEASURED_BYTES))


def _note_parity(parity: ParityReport, base: Path, expansion: Expansion) -> None:
    num_differing = len(parity.differing)
    in_base = len(compare_libraries(base, parity.differing).differing)
    expansion.parity = {
        "texts": parity.num_texts,
        "bytes": parity.num_bytes,
        "differing": num_differing,
        "differing_in_base": in_base,
        "examples": [text[:_EXAMPLE_CHARACTERS] for text in parity.differing[:10]],
    }
    log = logger.warning if num_differing > in_base else logger.info
    log(
        "SentencePiece and tokenizers give different ids for %d of %d texts (%.1f MB), for %d of "
        "them also without the new pieces%s",
        *(num_differing, parity.num_texts, parity.num_bytes / 1e6, in_base),
        "; SentencePiece's are the reference" if num_differing else "",
    )


def _write_pieces(job: _ExpansionJob, model: bytes) -> None:
    """Write the base's tokenizer directory with another tokenizer.model."""
    _copy_settings(job)
    (job.grown / "tokenizer.json").unlink(missing_ok=True)
    config = job.grown / "tokenizer_config.json"
    values = read_json(config) if config.is_file() else {}
    # A conversion that exists only as tokenizer.json is redone by LLaMA's own class.
    if values.get("tokenizer_class") in _CLASSES_OF_JSON:
        values["tokenizer_class"] = "LlamaTokenizer"
    write_json_atomic(config, values)
    (job.grown / _PIECES).write_bytes(model)
    _save(job.grown, job.config.pad_token)


def _copy_settings(job: _ExpansionJob) -> None:
    """Copy a tokenizer's settings and templates, but not its own files."""
    for file in job.base.iterdir():
        if file.is_file() and file.name not in TOKENIZER_FILES and _is_setting(file):
            shutil.copyfile(file, job.grown / file.name)


def _is_setting(file: Path) -> bool:
    return "token" in file.name or file.name == "chat_template.jinja"


def _save(grown: Path, pad_token: str | None) -> None:
    """Save a tokenizer directory again in all its formats, with the padding token, if any."""
    tokenizer = copy.deepcopy(load_tokenizer(grown))
    if pad_token is not None:
        tokenizer.add_special_tokens({"pad_token": pad_token})
    tokenizer.save_pretrained(grown)


def _grow_merges(job: _ExpansionJob, expansion: Expansion) -> None:
    merges = grow_byte_level(_engine(job.base), job.sample.texts, job.config.training.num_tokens)
    _copy_settings(job)
    write_json_atomic(job.grown / "tokenizer.json", merges.engine)
    _save(job.grown, job.config.pad_token)
    expansion.added = {
        "tokens": merges.num_new,
        "merges": merges.num_merges,
        "left_out": merges.left_out,
    }
    logger.info(
        "added %d tokens and %d merges; dropped, by reason: %s",
        *(merges.num_new, merges.num_merges, merges.left_out),
    )


def _compare(job: _ExpansionJob, expansion: Expansion) -> dict[str, tuple[Fertility, Fertility]]:
    """Measure both tokenizers on both kinds of text, and count old texts whose ids changed."""
    before, after = load_reference_encoder(job.base), load_reference_encoder(job.grown)
    table: dict[str, tuple[Fertility, Fertility]] = {}
    for name, sample in {"new text": job.sample, "old text": job.old_text}.items():
        texts = list(first_texts(sample.held_out or sample.texts, _MEASURED_BYTES))
        if not texts:
            continue
        pair = measure_fertility(before, texts), measure_fertility(after, texts)
        table[name] = pair
        expansion.fertility[name] = {
            "before": asdict(pair[0]),
            "after": asdict(pair[1]),
            "texts": len(texts),
            "texts_with_other_ids": _count_changed(before, after, texts),
        }
    if "old text" in table:
        old = expansion.fertility["old text"]
        logger.info(
            "%d of %d old texts get different ids", old["texts_with_other_ids"], old["texts"]
        )
    return table


def _count_changed(before: ReferenceEncoder, after: ReferenceEncoder, texts: list[str]) -> int:
    pairs = zip(before.encode(texts), after.encode(texts), strict=True)
    return sum(not np.array_equal(*pair) for pair in pairs)


def _hash_inputs(config: ExpandVocabConfig, base: Path) -> dict[str, str]:
    files = [file for file in sorted(base.iterdir()) if file.is_file() and _is_setting(file)]
    if config.pieces is not None:
        files.append(Path(config.pieces))
    return {file.name: hash_file(file) for file in files}
