"""Promise: every step stands once in metrics.jsonl, and FLOPs are counted as a hand would."""

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raytune_llama.model.config import EmbeddingsConfig, LoraConfig
from raytune_llama.model.embeddings import train_embeddings
from raytune_llama.model.llama import causal_lm
from raytune_llama.model.lora import attach_adapter
from raytune_llama.storage.place import Place
from raytune_llama.train.monitoring import metrics
from raytune_llama.train.monitoring.flops import flops_per_token
from raytune_llama.train.monitoring.metrics import (
    LOSS,
    EvaluationResult,
    MetricsLog,
    evaluation_metrics,
    read_metrics,
)

HIDDEN, INNER, LAYERS, ROWS, TOKENS = 32, 48, 2, 410, 24
# Query and output are square, key and value half as wide, and three matrices make the MLP.
LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * INNER
TABLE = ROWS * HIDDEN
ATTENTION = 6 * LAYERS * HIDDEN * TOKENS


def tiny(*, tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def write_steps(run_dir: Place, resumed_step: int, steps: range) -> None:
    log = MetricsLog(run_dir, resumed_step=resumed_step, tensorboard=False)
    with log:
        for step in steps:
            log.write(step, {LOSS: float(step)})


def steps_in(run_dir: Place) -> list[float]:
    return [record["step"] for record in read_metrics(run_dir)]


def test_metrics_log_after_resume_holds_each_step_once(run_dir: Place) -> None:
    write_steps(run_dir, 0, range(1, 6))
    write_steps(run_dir, 3, range(4, 8))
    assert steps_in(run_dir) == [1, 2, 3, 4, 5, 6, 7]
    write_steps(run_dir, 0, range(1, 3))
    assert steps_in(run_dir) == [1, 2]


def test_metrics_log_last_line_cut_is_left_out_and_written_anew(run_dir: Place) -> None:
    write_steps(run_dir, 0, range(1, 5))
    file = run_dir / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-4])
    assert steps_in(run_dir) == [1, 2, 3]
    write_steps(run_dir, 3, range(4, 6))
    assert steps_in(run_dir) == [1, 2, 3, 4, 5]


def test_metrics_log_number_cut_to_another_number_is_not_believed(tmp_path: Path) -> None:
    # Without its line break, a cut record may still be JSON.
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 2.0}\n{"step": 2, "a": 2.0}')
    assert steps_in(Place.local(tmp_path)) == [1]


def test_metrics_log_not_finite_is_null(tmp_path: Path) -> None:
    run_dir = Place.local(tmp_path)
    values = {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 0.1 + 0.2}
    with MetricsLog(run_dir, resumed_step=0, tensorboard=False) as log:
        log.write(1, values)
    assert read_metrics(run_dir) == [{"step": 1, "a": None, "b": None, "c": None, "d": 0.1 + 0.2}]


def test_metrics_log_is_readable_while_it_is_open(run_dir: Place) -> None:
    with MetricsLog(run_dir, resumed_step=0, tensorboard=False) as log:
        log.write(1, {LOSS: 2.0})
        # Nothing can be appended in object storage.
        assert steps_in(run_dir) == ([1] if run_dir.is_local else [])
        log.sync()
        assert steps_in(run_dir) == [1]
        assert (run_dir / "metrics.jsonl").read_json()[LOSS] == 2.0


def test_metrics_log_with_tensorboard_writes_events(run_dir: Place, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, last in ((0, 5), (3, 7)):
        with MetricsLog(run_dir, resumed_step=resumed, tensorboard=True) as log:
            for step in range(resumed + 1, last):
                log.write(step, {LOSS: float(step)})
            log.sync()
            assert len((run_dir / "tensorboard").files()) == (1 if resumed == 0 else 2)
    for file in (run_dir / "tensorboard").files():
        file.download(tmp_path / file.name)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars(LOSS)] == [1, 2, 3, 4, 5, 6]


def test_read_metrics_without_a_file_is_empty(run_dir: Place) -> None:
    assert read_metrics(run_dir) == []


@pytest.mark.parametrize("tied", [True, False])
def test_flops_per_token_full_training_counts_6_a_weight(*, tied: bool) -> None:
    # A tied table counts once, as the output projection; the look-up is free in both cases.
    wanted = 6 * (LAYERS * LAYER + TABLE) + ATTENTION
    assert flops_per_token(tiny(tied=tied), TOKENS) == wanted


@pytest.mark.parametrize("tied", [True, False])
def test_flops_per_token_lora_counts_4_a_frozen_weight(*, tied: bool) -> None:
    model = attach_adapter(tiny(tied=tied), LoraConfig(rank=4, targets=("q_proj",)), seed=0)
    lora = LAYERS * 4 * (HIDDEN + HIDDEN)
    wanted = 4 * (LAYERS * LAYER + TABLE) + 6 * lora + ATTENTION
    assert flops_per_token(causal_lm(model), TOKENS) == wanted


@pytest.mark.parametrize(
    ("tied", "saved"), [(True, ("embed_tokens",)), (False, ("embed_tokens", "lm_head"))]
)
def test_flops_per_token_saved_tables_count_as_trained_and_once(
    *, tied: bool, saved: tuple[str, ...]
) -> None:
    config = LoraConfig(rank=4, targets=("q_proj",), modules_to_save=saved)
    model = attach_adapter(tiny(tied=tied), config, seed=0)
    lora = LAYERS * 4 * (HIDDEN + HIDDEN)
    wanted = 4 * LAYERS * LAYER + 6 * TABLE + 6 * lora + ATTENTION
    assert flops_per_token(causal_lm(model), TOKENS) == wanted


@pytest.mark.parametrize(("tied", "trained"), [(True, 1), (False, 0)])
def test_flops_per_token_of_new_rows_count_them_as_trained_where_they_make_logits(
    *, tied: bool, trained: int
) -> None:
    model = tiny(tied=tied)
    train_embeddings(model, EmbeddingsConfig(new_rows_only=True), range(400, 410))
    wanted = 4 * (LAYERS * LAYER + TABLE) + 2 * trained * 10 * HIDDEN + ATTENTION
    assert flops_per_token(model, TOKENS) == wanted


def test_flops_per_token_of_7b_is_about_6n_full_and_4n_lora() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    num_weights = sum(weight.numel() for weight in model.parameters())
    assert num_weights == 6_738_415_616
    tokens = 512
    attention = 6 * 32 * 4096 * tokens
    full = flops_per_token(model, tokens) - attention
    # What N holds and no product uses: the look-up, 2 % of this model.
    assert 0.97 * 6 * num_weights < full < 6 * num_weights
    lora = flops_per_token(causal_lm(attach_adapter(model, LoraConfig(), seed=0)), tokens)
    assert lora - attention == pytest.approx(4 * num_weights, rel=0.02)


def test_metric_names_are_unique_and_have_a_group() -> None:
    names = [
        value
        for name, value in vars(metrics).items()
        if name.isupper() and isinstance(value, str) and name != "METRICS_FILE"
    ]
    assert len(names) > 15
    assert len(set(names)) == len(names)
    assert all("/" in name.strip("/") for name in names)


def test_evaluation_values_of_sources_add_up_to_the_total() -> None:
    texts = [EvaluationResult("a", 30.0, 10, 25.0), EvaluationResult("b", 20.0, 40, 75.0)]
    values = evaluation_metrics(texts)
    assert values == pytest.approx(
        {
            "eval/loss": 1.0,
            "eval/perplexity": math.e,
            "eval/bits_per_byte": 0.5 / math.log(2),
            "eval/loss/a": 3.0,
            "eval/bits_per_byte/a": 1.2 / math.log(2),
            "eval/loss/b": 0.5,
            "eval/bits_per_byte/b": 20 / 75 / math.log(2),
        }
    )


def test_evaluation_values_of_text_without_a_target_are_not_numbers() -> None:
    texts = [EvaluationResult("a", 30.0, 10, 25.0), EvaluationResult("b", 0.0, 0, 4.0)]
    values = evaluation_metrics(texts)
    assert values["eval/loss"] == 3.0
    assert math.isnan(values["eval/loss/b"])
    assert math.isnan(evaluation_metrics(texts[1:])["eval/loss"])
