"""Preview of a corpus: some documents as the tokens that training will see."""

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
_COLORS = ("\x1b[30;48;5;153m", "\x1b[30;48;5;229m", "\x1b[30;48;5;157m")
_MAX_TOKENS = 400  # shown per document
_MAX_GROUP = 8  # tokens that can make up one character


@dataclass(frozen=True)
class _Shown:
    """Text decoded from one token, or from several that form whole characters only together."""

    text: str
    num_tokens: int
    is_control: bool


def render_preview(
    config: DataConfig, tokenizer_path: Path, *, num_documents: int, color: bool
) -> str:
    """Return the first documents of each source with their token boundaries.

    Control tokens are shown by name. With colors, the first token of a document is underlined: it
    is never a target, as nothing precedes it. Text that needs n tokens for whole characters is
    followed by n - 1 dots.

    Args:
        config: Sources, and whether BOS and EOS are added.
        tokenizer_path: Directory of the tokenizer.
        num_documents: Number of documents per source.
        color: Whether to mark tokens with ANSI colors; otherwise "|" separates them.

    Raises:
        ConfigError: The config has problems; lists all of them.
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
            lines.append(_render(ids, tokenizer, color=color))
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
    before, after = ([id_] if isinstance(id_, int) and wanted else [] for id_, wanted in ends)
    return [*before, *ids, *after]


def _render(ids: list[int], tokenizer: PreTrainedTokenizerFast, *, color: bool) -> str:
    parts: list[str] = []
    for number, shown in enumerate(_grouped(ids[:_MAX_TOKENS], tokenizer)):
        text = shown.text.replace("\n", "\\n").replace("\t", "\\t") + "." * (shown.num_tokens - 1)
        if not color:
            parts.append(f"[{text}]" if shown.is_control else text)
            continue
        style = _CONTROL if shown.is_control else _COLORS[number % len(_COLORS)]
        parts.append(f"{style}{_DIM if number == 0 else ''}{text}{_RESET}")
    more = f" ... {len(ids) - _MAX_TOKENS} more tokens" if len(ids) > _MAX_TOKENS else ""
    return ("" if color else "|").join(parts) + more


def _grouped(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> Iterator[_Shown]:
    """Group tokens until they decode to whole characters."""
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
    """Decode tokens [start, stop) in context: decoded alone, the first one can lose a space."""
    before = str(tokenizer.decode(ids[:start]))
    return str(tokenizer.decode(ids[:stop]))[len(before) :]
