"""Answers of a model in one process: the ids of serving, and the tokens of transformers."""

import asyncio
import random
from contextlib import aclosing, closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raytune_llama.config.settings import ConfigError
from raytune_llama.generate.worker import Generator, describe_model
from raytune_llama.serve.backend import LoadedModel
from raytune_llama.serve.config import ServeConfig, ServedModelConfig
from raytune_llama.serve.protocol.chat import ChatRequest
from raytune_llama.tokenizer.loader import load_tokenizer
from tests.generate.conftest import (
    MakeConfig,
    TinyModel,
    answer,
    generate_greedily,
    read_rows,
)
from tests.serve.adapters.conftest import by_peft

TEXTS = ("the quick", "人民日报 <s>", "a lazy dog jumps over", " for index in range(10): total")


def test_raw_text_is_continued_after_the_ids_of_the_tokenizer(
    make_config: MakeConfig, tiny: TinyModel
) -> None:
    plain = [text for text in TEXTS if "<s>" not in text]
    records = answer(make_config("\n".join(plain), with_prompt=False))
    tokenizer = load_tokenizer(tiny.path)
    for text, record in zip(plain, records, strict=True):
        ids = tokenizer(text)["input_ids"]
        assert record["num_prompt_tokens"] == len(ids)
        assert record["output"] == generate_greedily(tiny.path, ids, 12)
        assert record["num_output_tokens"] <= 12


def test_conversation_is_answered_as_transformers_and_serving_answer_it(
    make_config: MakeConfig, tiny: TinyModel
) -> None:
    records = answer(make_config("\n".join(TEXTS), system="Be brief."))
    served = ServeConfig(models=(ServedModelConfig(path=str(tiny.path), name="tiny"),))

    async def ask(messages: list[dict[str, str]]) -> tuple[str, int]:
        asked = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 12}
        text = ""
        async with aclosing(await model.respond(ChatRequest.model_validate(asked))) as stream:
            async for delta in stream.deltas:
                text += delta.text
        return text, stream.num_prompt_tokens

    with closing(LoadedModel(served.models[0], served)) as model:
        for record in records:
            found = (record["output"], record["num_prompt_tokens"])
            assert found == asyncio.run(ask(record["messages"]))
    tokenizer = load_tokenizer(tiny.path)
    text = tokenizer.apply_chat_template(
        records[0]["messages"], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    assert records[0]["output"] == generate_greedily(tiny.path, ids, 12)


def test_answers_do_not_depend_on_order_or_on_calls(make_config: MakeConfig) -> None:
    text = "the fox\n" * 9
    config = make_config(text, sampling={"temperature": 1.0, "seed": 3, "max_new_tokens": 8})
    rows = read_rows(config)
    mixed = random.Random(1).sample(rows, len(rows))
    records = answer(config)
    other = sorted(answer(config, mixed[:2], mixed[2:]), key=lambda record: record["index"])
    assert other == records
    assert len({record["output"] for record in records}) == 9
    again = answer(make_config(text, sampling={"temperature": 1.0, "max_new_tokens": 8}))
    assert [one["output"] for one in again] != [one["output"] for one in records]


def test_row_without_room_in_the_context_is_written_with_its_length(
    make_config: MakeConfig,
) -> None:
    text = "the fox\n" + "the lazy dog " * 40 + "\n" + "x" * 100_000 + "\n"
    records = answer(make_config(text, model={"max_context": 64}))
    assert [record["finish_reason"] for record in records[1:]] == ["too_long", "too_long"]
    assert records[0]["output"]
    assert [record["output"] for record in records[1:]] == [None, None]
    assert records[1]["num_prompt_tokens"] >= 64
    assert f"{records[1]['num_prompt_tokens']} tokens" in records[1]["error"]
    assert "characters" in records[2]["error"]


def test_answer_ends_at_the_context_and_at_stop_texts(
    make_config: MakeConfig, tiny: TinyModel
) -> None:
    config = make_config("the fox\n", with_prompt=False, sampling={"max_new_tokens": 60})
    (full,) = answer(config)
    room = full["num_prompt_tokens"] + 5
    (cut,) = answer(replace(config, model=replace(config.model, max_context=room)))
    assert (cut["finish_reason"], cut["num_output_tokens"]) == ("length", 5)
    stop = full["output"][3:6]
    (stopped,) = answer(replace(config, sampling=replace(config.sampling, stop=(stop,))))
    assert stopped["finish_reason"] == "stop"
    assert stopped["output"] == full["output"][: full["output"].index(stop)]


def test_row_that_cannot_be_used_has_an_error(make_config: MakeConfig) -> None:
    text = '{"prompt": "a"}\n{"prompt": 1}\n'
    good, bad = answer(make_config(text, suffix="jsonl"))
    assert good["output"] is not None
    assert (bad["output"], bad["finish_reason"]) == (None, "unusable")
    assert "column 'prompt' is a number" in bad["error"]


def test_adapter_answers_as_peft(make_config: MakeConfig, tiny: TinyModel) -> None:
    config = make_config("the quick\n", with_prompt=False, model={"adapter": str(tiny.adapter)})
    (record,) = answer(config)
    assert record["output"] == by_peft(tiny.path, tiny.adapter, "the quick")
    assert record["output"] != by_peft(tiny.path, None, "the quick")


def test_adapter_of_another_model_is_refused_before_weights_are_read(
    make_config: MakeConfig, tiny: TinyModel, untemplated_dir: Path
) -> None:
    config = make_config("a\n", model={"path": str(untemplated_dir), "adapter": str(tiny.adapter)})
    with pytest.raises(ConfigError, match=r"^model\.adapter: "):
        describe_model(replace(config, with_prompt=False))


def test_model_without_a_template_is_refused_only_where_one_is_needed(
    make_config: MakeConfig, untemplated_dir: Path
) -> None:
    config = make_config("the fox\n", model={"path": str(untemplated_dir)})
    with pytest.raises(ConfigError, match=r"^model\.template: .* has no chat template"):
        describe_model(config)
    assert describe_model(replace(config, with_prompt=False)).chat is None
    preset = describe_model(replace(config, preset="belle"))
    assert preset.chat is not None
    assert preset.chat.template.name == "belle"


def test_model_is_described_without_its_weights(make_config: MakeConfig) -> None:
    assert describe_model(make_config("a\n")).model.device == torch.device("meta")


def test_damaged_adapter_is_refused_when_it_is_loaded(
    make_config: MakeConfig, tiny: TinyModel, tmp_path: Path
) -> None:
    config = make_config("a\n", model={"adapter": str(tmp_path / "none")})
    with pytest.raises(ValueError, match=r"model\.adapter"):
        Generator(config, cpus=1)
