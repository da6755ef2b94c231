"""Some documents of a corpus as the tokens that training will see, to look at before it starts."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from raytune_llama.data.build.actors import read_head_rows
from raytune_llama.data.build.preparation import open_data
from raytune_llama.data.config import DataConfig
from raytune_llama.data.readers.sources import SourceFile
from raytune_llama.tokenizer.loader import encode_text

_RESET, _CONTROL, _DIM = "\x1b[0m", "\x1b[1;97;45m", "\x1b[2;4m"
_COLOURS = ("\x1b[30;48;5;153m", "\x1b[30;48;5;229m", "\x1b[30;48;5;157m")
_MAX_TOKENS = 400  # shown of one document
_MAX_GROUP = 8  # tokens that can make up one character


@dataclass(frozen=True)
class _Shown:
    """Tokens that stand for one piece of text."""

    text: str
    num_tokens: int
    is_control: bool


def render_preview(
    config: DataConfig, tokenizer_path: Path, *, num_documents: int, colour: bool
) -> str:
    """Return the first documents of each source with their token boundaries.

    Control tokens stand out by their names. The first token of a document is underlined: it is
    never a target, since nothing comes before it. A dot for each token but one follows a piece of
    text that only several tokens make up.

    Args:
        config: The sources, and what is put around a document.
        tokenizer_path: Directory of the tokenizer.
        num_documents: Documents of each source.
        colour: Whether to colour tokens as terminals do; else "|" stands between them.

    Raises:
        ConfigError: Problems of the config, all of them.
    """
    inputs = open_data(config, tokenizer_path)
    tokenizer, files = inputs.tokenizer, inputs.corpus.files
    lines: list[str] = []
    for number in range(len(config.sources)):
        mine = [file for file in files if file.source == number]
        for file, offset, text in islice(_documents(mine), num_documents):
            ids = _with_ends(encode_text(tokenizer, [text])[0], tokenizer, config)
            lines.append(
                f"source {number}, {file.name} at byte {offset}: {len(text.encode())} bytes, "
                f"{len(ids)} tokens"
            )
            lines.append(_render(ids, tokenizer, colour=colour))
            lines.append("")
    return "\n".join(lines)


def _documents(files: list[SourceFile]) -> Iterator[tuple[SourceFile, int, str]]:
    for file in files:
        for batch in read_head_rows(file):
            for text, offset in zip(batch.texts, batch.offsets, strict=True):
                if text.strip():
                    yield file, offset, text


def _with_ends(ids: list[int], tokenizer: PreTrainedTokenizerFast, config: DataConfig) -> list[int]:
    ends = (tokenizer.bos_token_id, config.bos), (tokenizer.eos_token_id, config.eos)
    before, behind = ([id_] if isinstance(id_, int) and wanted else [] for id_, wanted in ends)
    return [*before, *ids, *behind]


def _render(ids: list[int], tokenizer: PreTrainedTokenizerFast, *, colour: bool) -> str:
    parts: list[str] = []
    for number, shown in enumerate(_grouped(ids[:_MAX_TOKENS], tokenizer)):
        text = shown.text.replace("\n", "\\n").replace("\t", "\\t") + "." * (shown.num_tokens - 1)
        if not colour:
            parts.append(f"[{text}]" if shown.is_control else text)
            continue
        style = _CONTROL if shown.is_control else _COLOURS[number % len(_COLOURS)]
        parts.append(f"{style}{_DIM if number == 0 else ''}{text}{_RESET}")
    more = f" ... {len(ids) - _MAX_TOKENS} tokens more" if len(ids) > _MAX_TOKENS else ""
    return ("" if colour else "|").join(parts) + more


def _grouped(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> Iterator[_Shown]:
    """Put tokens together until they are whole characters."""
    control = set(tokenizer.all_special_ids)
    start = 0
    while start < len(ids):
        if ids[start] in control:
            name = str(tokenizer.convert_ids_to_tokens(ids[start]))
            yield _Shown(name, 1, is_control=True)
            start += 1
            continue
        stop = start + 1
        text = _text(ids, start, stop, tokenizer)
        while "\ufffd" in text and stop < min(len(ids), start + _MAX_GROUP):
            stop += 1
            text = _text(ids, start, stop, tokenizer)
        yield _Shown(text, stop - start, is_control=False)
        start = stop


def _text(ids: list[int], start: int, stop: int, tokenizer: PreTrainedTokenizerFast) -> str:
    """Decode some tokens behind those before them: alone, the first one can lose a space."""
    before = str(tokenizer.decode(ids[:start]))
    return str(tokenizer.decode(ids[:stop]))[len(before) :]
