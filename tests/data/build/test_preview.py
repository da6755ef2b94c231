"""Promise: a preview shows the very tokens of the store, and what becomes of each of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from raytune_llama.chat.encoding import EncodedConversation, build_chat_encoder
from raytune_llama.chat.formats import RowFormat, read_row
from raytune_llama.chat.row_fields import KeyCounts
from raytune_llama.cli import VERBS
from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.data.build.preview import render_preview
from raytune_llama.data.config import ChatDataConfig, DataConfig
from raytune_llama.tokenizer.loader import encode_text, load_tokenizer

TEXTS = ["the quick brown fox", "人民日报\n新年", "\U0001f600 </s>"]


def config(tmp_path: Path) -> DataConfig:
    rows = "\n".join(json.dumps({"text": text}) for text in [*TEXTS, "", "one more"])
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "b.txt").write_text("a line\n")
    sources = [{"path": str(tmp_path / name)} for name in ("a.jsonl", "b.txt")]
    fields = {"sources": sources, "store_dir": str(tmp_path / "store"), "bos": True}
    return from_dict(DataConfig, fields)


def test_preview_pieces_put_together_are_the_documents(tmp_path: Path, tokenizer_dir: Path) -> None:
    lines = render_preview(config(tmp_path), tokenizer_dir, num_documents=3, color=False).split(
        "\n"
    )
    tokenizer = load_tokenizer(tokenizer_dir)
    bos, eos = f"[{tokenizer.bos_token}]", f"[{tokenizer.eos_token}]"
    for number, text in enumerate([*TEXTS, "a line"]):
        head, shown = lines[3 * number], lines[3 * number + 1]
        ids = encode_text(tokenizer, [text])[0]
        assert f"{len(text.encode())} bytes, {len(ids) + 2} tokens" in head
        pieces = shown.split("|")
        assert (pieces[0], pieces[-1]) == (bos, eos)
        assert "".join(piece.rstrip(".") for piece in pieces[1:-1]) == text.replace("\n", "\\n")
        dots = sum(len(piece) - len(piece.rstrip(".")) for piece in pieces[1:-1])
        assert len(pieces) - 2 + dots == len(ids)
    assert not (tmp_path / "store").exists()


def test_preview_in_color_has_the_same_text(tmp_path: Path, tokenizer_dir: Path) -> None:
    plain = render_preview(config(tmp_path), tokenizer_dir, num_documents=1, color=False)
    color = render_preview(config(tmp_path), tokenizer_dir, num_documents=1, color=True)
    assert "\x1b[" in color
    unboxed = re.sub(r"\[(</?s>)\]", r"\1", plain.replace("|", ""))
    assert re.sub("\x1b" + r"\[[0-9;]*m", "", color) == unboxed


def test_preview_of_a_config_with_mistakes_names_them(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "b.txt").write_text("x")
    bad = from_dict(
        DataConfig,
        {"sources": [{"path": str(tmp_path / "none")}], "store_dir": str(tmp_path / "store")},
    )
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.path"):
        render_preview(bad, tokenizer_dir, num_documents=1, color=False)


def test_preview_rows_come_from_several_files_and_not_only_their_beginnings(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.txt").write_text("".join(f"{name}{n}\n" for n in range(100)))
    data = {"sources": [{"path": str(folder)}], "store_dir": str(tmp_path / "store")}
    made = from_dict(DataConfig, data)
    shown = render_preview(made, tokenizer_dir, num_documents=4, color=False)
    assert re.findall(r"source 0, (\w)\.txt at byte (\d+)", shown) == [
        ("a", "0"),
        ("b", "90"),  # the 26th of 100 lines
        ("c", "190"),
        ("d", "290"),
    ]
    assert shown == render_preview(made, tokenizer_dir, num_documents=4, color=False)


def test_preview_of_cleaned_text_shows_what_is_kept_and_why_the_rest_is_not(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "\\uff21 long enough text"}\n{"text": "b"}\n{"text": 1}\n'
    )
    data = {
        "sources": [{"path": str(tmp_path / "a.jsonl")}],
        "store_dir": str(tmp_path / "store"),
        "cleaning": {"normalization": "NFKC", "min_characters": 5},
    }
    shown = render_preview(
        from_dict(DataConfig, data), tokenizer_dir, num_documents=3, color=False
    ).split("\n")
    assert "".join(shown[1].split("|")[:-1]) == "A long enough text"
    first = (tmp_path / "a.jsonl").read_text().splitlines()[0]
    dropped = f"a.jsonl at byte {len(first) + 1}: dropped by data.cleaning: "
    assert any(dropped in line for line in shown)
    assert any("unusable: wrong_type" in line for line in shown)


ROWS: list[dict[str, Any]] = [
    {"instruction": "Name a fox.", "output": "The quick brown fox."},
    {"instruction": "Say it.", "output": "新年的钟声敲响了。"},
    {"instruction": "no answer", "output": " "},
    {"instruction": "Count </s> to ten", "output": "for index in range(10)\n\tpass"},
]


def chat_config(tmp_path: Path, rows: list[dict[str, Any]], **chat: Any) -> ChatDataConfig:  # noqa: ANN401
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    data = {
        "sources": [{"path": str(tmp_path / "rows.jsonl")}],
        "store_dir": str(tmp_path / "store"),
        "chat": {"template": "alpaca", **chat},
    }
    return from_dict(ChatDataConfig, data)


def encode(config: ChatDataConfig, tokenizer_dir: Path, row: dict[str, Any]) -> EncodedConversation:
    read: Any = read_row(row, RowFormat("alpaca"), KeyCounts())
    (made,) = build_chat_encoder(load_tokenizer(tokenizer_dir), config.chat).encode([read])
    assert isinstance(made, EncodedConversation)
    return made


def blocks_of(shown: str) -> dict[str, list[tuple[str, list[str]]]]:
    """Return the spans below each title, as (kind, tokens)."""
    blocks: dict[str, list[tuple[str, list[str]]]] = {}
    for block in shown.split("\n\n"):
        title, *lines = block.split("\n")
        if title.startswith("rows.jsonl, "):
            blocks[title] = [(line[2:11].strip(), line[11:].split("|")) for line in lines if line]
    return blocks


def test_preview_of_conversations_tells_learned_tokens_from_masked_ones(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    config = chat_config(tmp_path, ROWS)
    shown = render_preview(config, tokenizer_dir, num_documents=4, color=False)
    blocks = blocks_of(shown)
    for number, row in enumerate(ROWS):
        (title,) = [
            title for title in blocks if title.startswith(f"rows.jsonl, line {number + 1}:")
        ]
        if number == 2:
            assert title.startswith("rows.jsonl, line 3: unusable: empty_target: ")
            continue
        made = encode(config, tokenizer_dir, row)
        num_learned = int(made.targets.sum())
        assert title.endswith(f": {len(made.ids)} tokens, {num_learned} learned")
        (masked, learned) = blocks[title]
        assert (masked[0], learned[0]) == ("masked", "learned")
        assert (masked[1][0], learned[1][-1]) == ("[<s>]", "[</s>]")
        escaped = row["output"].replace("\n", "\\n").replace("\t", "\\t")
        said = "".join(piece.rstrip(".") for piece in learned[1][:-1])
        assert said == escaped.rstrip(".")
        dots = sum(len(piece) - len(piece.rstrip(".")) for piece in learned[1])
        assert len(learned[1]) + dots == num_learned + row["output"].endswith(".")
    legend = shown.split("\n\n")[0]
    assert all(f"{kind} " in legend for kind in ("learned", "masked", "cut"))
    assert "4 rows read from the beginnings of 1 of 1 files, 1 unusable: 1 empty_target" in shown
    assert not (tmp_path / "store").exists()


def test_preview_of_a_control_string_in_a_message_is_text(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    config = chat_config(tmp_path, ROWS[3:])
    shown = render_preview(config, tokenizer_dir, num_documents=1, color=False)
    ((masked, learned),) = blocks_of(shown).values()
    assert "[</s>]" not in masked[1]
    assert "</s>" in "".join(masked[1])
    assert learned[1].count("[</s>]") == 1


@pytest.mark.parametrize(
    ("truncation", "kinds"),
    [
        ("keep_eos", ["masked", "learned", "cut", "learned"]),
        ("cut_left", ["masked", "cut", "learned"]),
        ("drop", ["cut"]),
    ],
)
def test_preview_of_a_long_conversation_shows_what_is_cut(
    tmp_path: Path, tokenizer_dir: Path, truncation: str, kinds: list[str]
) -> None:
    row = {"instruction": "fox", "output": "the lazy dog " * 8}
    whole = encode(chat_config(tmp_path, [row]), tokenizer_dir, row)
    num_answer = int(whole.targets.sum())
    limit = len(whole.ids) - 6 if truncation != "cut_left" else num_answer - 3
    config = chat_config(tmp_path, [row], max_tokens=limit, truncation=truncation)
    shown = render_preview(config, tokenizer_dir, num_documents=1, color=False)
    ((title, spans),) = blocks_of(shown).items()
    assert [kind for kind, _ in spans] == kinds
    if truncation == "drop":
        wanted = f"left out: too_long: {len(whole.ids)} tokens, max_tokens is {limit}"
        assert title == f"rows.jsonl, line 1: {wanted}"
        return
    made = encode(config, tokenizer_dir, row)
    lost = ", an answer lost its question" if truncation == "cut_left" else ""
    assert title == (
        f"rows.jsonl, line 1: {len(whole.ids)} tokens, {int(made.targets.sum())} learned, "
        f"{made.num_cut} cut{lost}"
    )
    assert sum(len(pieces) for kind, pieces in spans if kind == "learned") == made.targets.sum()


def test_preview_of_long_turns_shows_both_ends_and_counts_the_rest(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    rows = [{"instruction": "a " * 500, "output": "b " * 500 + "end"}]
    shown = render_preview(chat_config(tmp_path, rows), tokenizer_dir, num_documents=1, color=False)
    learned = next(line for line in shown.split("\n") if line.startswith("  learned  "))
    found = re.search(r" \.\.\. (\d+) more tokens learned \.\.\. ", learned)
    assert found
    made = encode(chat_config(tmp_path, rows), tokenizer_dir, rows[0])
    pieces = learned[11:].replace(found[0], "|").split("|")
    assert len(pieces) + int(found[1]) == made.targets.sum()
    assert learned.endswith("d|[</s>]")


def test_preview_shows_a_row_for_each_reason_even_if_it_is_not_among_the_chosen(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    rows = [ROWS[0]] * 20
    rows[7], rows[11] = {"instruction": "a", "output": ""}, {"instruction": 7, "output": "x"}
    shown = render_preview(chat_config(tmp_path, rows), tokenizer_dir, num_documents=2, color=False)
    titles = [title.partition(", ")[2] for title in blocks_of(shown)]
    assert [title.partition(":")[0] for title in titles] == [
        "line 1",
        "line 11",
        "line 8",
        "line 12",
    ]
    assert "empty_target" in titles[2]
    assert "wrong_type" in titles[3]


def test_preview_of_conversations_in_color_has_the_same_text(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    config = chat_config(tmp_path, ROWS)
    plain, color = (
        render_preview(config, tokenizer_dir, num_documents=2, color=color)
        for color in (False, True)
    )
    first = color.split("\n\n")[2].split("\n")[1]
    ((_, spans), *_) = blocks_of(plain).items()
    text = "".join(piece.strip("[]") for _, pieces in spans for piece in pieces)
    assert re.sub("\x1b" + r"\[[0-9;]*m", "", first).strip() == text
    styles = re.findall("\x1b" + r"\[([0-9;]+)m", first)
    assert len(set(styles)) == 6 + 1  # two shades and a control style of each kind, and the reset


@pytest.mark.parametrize(("no_color", "is_colored"), [("", True), ("1", False)])
def test_prepare_data_preview_obeys_no_color(
    tmp_path: Path,
    tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    no_color: str,
    is_colored: bool,
) -> None:
    chat_config(tmp_path, ROWS)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    argv = [
        f"tokenizer={tokenizer_dir}",
        f"data={{sources: [{{path: {tmp_path}/rows.jsonl}}], store_dir: {tmp_path}/store, "
        "chat: {template: alpaca}}",
        "preview=true",
    ]
    assert VERBS["prepare-data"](argv, "raytune prepare-data") == 0
    assert ("\x1b[" in capsys.readouterr().out) is is_colored
