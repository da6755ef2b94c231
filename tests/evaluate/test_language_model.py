"""A model in this process answers lm-evaluation-harness as its own `hf` model does."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import AutoModelForCausalLM

from raytune_llama.config.errors import UserError
from raytune_llama.evaluate.config import EvaluatedModelConfig
from raytune_llama.evaluate.language_model import ServedLanguageModel
from raytune_llama.evaluate.models import load_model

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "我们", "喜欢", "学习", "17", "A", "B"]


def load(folder: Path, *adapters: Path, max_context: int | None = None) -> ServedLanguageModel:
    config = EvaluatedModelConfig(
        path=str(folder), adapters=tuple(map(str, adapters)), max_context=max_context
    )
    return ServedLanguageModel(
        load_model(config, field="models.0", scratch=folder.parent, use_gpu=False)
    )


def load_theirs(model: object, **options: object) -> Any:  # noqa: ANN401  # a decorated class
    """Return lm-eval's own model, in fp32 on the CPU."""
    make: Any = HFLM
    return make(pretrained=model, dtype="float32", device="cpu", **options)


@pytest.fixture(scope="module")
def ours(model_dir: Path) -> ServedLanguageModel:
    return load(model_dir)


@pytest.fixture(scope="module")
def plain_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of the same model without a chat template."""
    folder = tmp_path_factory.mktemp("plain") / "plain"
    shutil.copytree(model_dir, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(scope="module")
def theirs(model_dir: Path) -> Any:  # noqa: ANN401
    return load_theirs(str(model_dir), batch_size=3)


def ask(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=argument, idx=number)  # pyright: ignore[reportArgumentType]
        for number, argument in enumerate(arguments)
    ]


def sentence(generator: random.Random, length: int) -> str:
    return " ".join(generator.choices(WORDS, k=length))


def questions(number: int) -> list[tuple[str, str]]:
    """Return questions that begin with the same example, each with options of several tokens."""
    generator = random.Random(0)
    example = sentence(generator, 40)
    return [
        (f"{example}\n{question}\nAnswer:", option)
        for question in (sentence(generator, generator.randint(1, 15)) for _ in range(number))
        for option in (" A", " B", " the brown dog", "我们", "A")
    ]


def test_log_likelihoods_equal_those_of_lm_eval(
    ours: ServedLanguageModel,
    theirs: Any,  # noqa: ANN401
) -> None:
    pairs = [*questions(8), ("", "the fox"), ("trailing space ", "A"), ("the quick", "\n\nfox")]
    found = ours.loglikelihood(ask("loglikelihood", pairs))
    wanted = theirs.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in wanted]
    assert [logprob for logprob, _ in found] == pytest.approx(
        [logprob for logprob, _ in wanted], abs=1e-4
    )


def test_context_that_is_too_long_is_cut_as_by_lm_eval(model_dir: Path) -> None:
    ours = load(model_dir, max_context=64)
    theirs = load_theirs(str(model_dir), batch_size=1, max_length=64)
    pairs = questions(2)
    assert len(ours.tok_encode(pairs[0][0])) > 64
    found = ours.loglikelihood(ask("loglikelihood", pairs))
    wanted = theirs.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True)
    assert [logprob for logprob, _ in found] == pytest.approx(
        [logprob for logprob, _ in wanted], abs=1e-4
    )


def test_rolling_log_likelihoods_equal_those_of_lm_eval(model_dir: Path) -> None:
    ours = load(model_dir, max_context=64)
    theirs = load_theirs(str(model_dir), batch_size=1, max_length=64)
    generator = random.Random(1)
    texts = [(sentence(generator, length),) for length in (1, 20, 100)]
    found = ours.loglikelihood_rolling(ask("loglikelihood_rolling", texts))
    wanted = theirs.loglikelihood_rolling(ask("loglikelihood_rolling", texts), disable_tqdm=True)
    assert found == pytest.approx(wanted, abs=1e-3)


def test_generated_answers_equal_those_of_lm_eval(plain_dir: Path) -> None:
    ours = load(plain_dir)
    theirs = load_theirs(str(plain_dir), batch_size=3)
    generator = random.Random(2)
    options = {"until": ["fox", "\n"], "max_gen_toks": 20, "do_sample": False}
    prompts = [(sentence(generator, length), dict(options)) for length in range(1, 20)]
    found = ours.generate_until(ask("generate_until", prompts))
    prompts = [(prompt, dict(options)) for prompt, _ in prompts]
    wanted = theirs.generate_until(ask("generate_until", prompts), disable_tqdm=True)
    assert found == wanted


def test_unknown_generation_option_is_refused(ours: ServedLanguageModel) -> None:
    with pytest.raises(UserError, match="num_beams"):
        ours.generate_until(ask("generate_until", [("the", {"until": [], "num_beams": 4})]))


def test_prompt_with_chat_template_has_the_ids_of_serving(ours: ServedLanguageModel) -> None:
    content = "what is </s> and <|im_end|>?"
    text = ours.apply_chat_template([{"role": "user", "content": content}])
    ids = ours.tok_encode(text)
    special = {"<s>", "</s>", "<|im_end|>"}
    tokens = ours._served.tokenizer.convert_ids_to_tokens(ids)
    # The template's own: the user's turn, its end and the assistant's; none of the content's.
    assert [token for token in tokens if token in special] == ["<s>", "<|im_end|>", "<s>"]
    plain = ours.loglikelihood(ask("loglikelihood", [(text, "fox")]))[0][0]
    with torch.inference_mode():
        rest = ours._served.tokenizer("fox", add_special_tokens=False)["input_ids"]
        logits = ours._served.model(input_ids=torch.tensor([[*ids, *rest]])).logits[0]
    rows = logits[len(ids) - 1 : -1].log_softmax(1)
    assert plain == pytest.approx(
        sum(float(row[token]) for row, token in zip(rows, rest, strict=True)), abs=1e-4
    )


def test_adapter_scores_as_under_peft(model_dir: Path, adapter_dir: Path) -> None:
    ours = load(model_dir, adapter_dir)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    attached = PeftModel.from_pretrained(base, str(adapter_dir)).eval()
    theirs = load_theirs(attached, tokenizer=str(model_dir), batch_size=2)
    pairs = questions(3)
    found = ours.loglikelihood(ask("loglikelihood", pairs))
    wanted = theirs.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True)
    plain = load(model_dir).loglikelihood(ask("loglikelihood", pairs))
    assert [logprob for logprob, _ in found] == pytest.approx(
        [logprob for logprob, _ in wanted], abs=1e-4
    )
    assert max(abs(one - other) for (one, _), (other, _) in zip(found, plain, strict=True)) > 0.01


def test_chat_template_of_a_model_without_one_is_refused(plain_dir: Path) -> None:
    with pytest.raises(UserError, match="chat_template"):
        load(plain_dir).apply_chat_template([{"role": "user", "content": "hello"}])
