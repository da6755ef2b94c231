"""Promise: a worker whose copy of a weight is another than the others' is found and named."""

import socket
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from raytune_llama.config.settings import override
from raytune_llama.tokenizer.loader import load_tokenizer
from raytune_llama.train.loop import open_session
from raytune_llama.train.monitoring.metrics import LOSS
from raytune_llama.train.monitoring.replica_check import ReplicaError, checksum, compare_replicas
from raytune_llama.train.process_group import ProcessGroup
from tests.train.conftest import MakeConfig, curve, stage_fields, write_model
from tests.train.group import Group

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64]


def flip_bit(tensor: Tensor, bit: int) -> None:
    """Flip one bit of the memory of a tensor."""
    data = tensor.view(-1).view(torch.uint8)
    data[bit // 8] ^= 1 << (bit % 8)


@given(
    dtype=st.sampled_from(DTYPES),
    numel=st.integers(1, 40),
    place=st.floats(0, 1, exclude_max=True),
)
def test_checksum_changes_with_any_one_bit(dtype: torch.dtype, numel: int, place: float) -> None:
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    before = int(checksum(tensor))
    assert int(checksum(tensor.clone())) == before
    flip_bit(tensor, int(place * 8 * tensor.numel() * tensor.element_size()))
    assert int(checksum(tensor)) != before


def test_checksum_of_nothing_and_of_a_view() -> None:
    assert int(checksum(torch.empty(0))) == 0
    table = torch.arange(12.0).view(3, 4)
    assert int(checksum(table.T)) == int(checksum(table.T.contiguous()))
    between_words = torch.randn(9)[1:]
    assert int(checksum(between_words)) == int(checksum(between_words.clone()))


def _compare(wrong: list[int], answers: Path, workers: ProcessGroup) -> None:
    tensors = {"first": torch.arange(100.0), "second": torch.ones(7, dtype=torch.bfloat16)}
    if workers.rank in wrong:
        flip_bit(tensors["second"], 9 + workers.rank)
    said = ""
    try:
        compare_replicas(300, tensors.items(), workers)
    except ReplicaError as error:
        said = str(error)
    (answers / str(workers.rank)).write_text(said)


def compare(group: Group, folder: Path, wrong: list[int]) -> str:
    """Compare on processes of which some have a flipped bit; return what all of them say."""
    group.call(partial(_compare, wrong, folder))
    (said,) = {file.read_text() for file in folder.iterdir()}
    return said


def test_compare_replicas_names_the_worker_that_most_differ_from(
    three: Group, tmp_path: Path
) -> None:
    said = compare(three, tmp_path, [1])
    assert f"worker 1 on {socket.gethostname()}" in said
    assert "second" in said
    assert "step 300" in said
    assert not any(text in said for text in ("worker 0", "worker 2", "first"))


def test_compare_replicas_of_two_names_both(two: Group, tmp_path: Path) -> None:
    said = compare(two, tmp_path, [1])
    host = socket.gethostname()
    assert f"worker 0 on {host}, worker 1 on {host}" in said


def test_compare_replicas_that_are_alike_says_nothing(two: Group, tmp_path: Path) -> None:
    assert compare(two, tmp_path, []) == ""


@pytest.mark.parametrize(
    ("fields", "holds_all"),
    [
        (stage_fields(0), True),
        (stage_fields(1), True),
        (stage_fields(2), True),
        (stage_fields(3), False),
        ({"engine__strategy": "fsdp"}, False),
    ],
)
def test_engine_compares_all_weights_or_where_they_are_cut_up_none(
    make_config: MakeConfig,
    fields: dict[str, object],
    holds_all: bool,  # noqa: FBT001
) -> None:
    engine = open_session(make_config(**fields), ProcessGroup.single_process()).engine
    found = {name for name, _ in engine.replicated_tensors()}
    if holds_all:
        assert found >= {name for name, _ in engine.module.named_parameters()}
    else:
        assert not found


def test_train_with_another_bit_on_one_worker_stops_before_it_is_saved(
    make_config: MakeConfig, two: Group, tokenizer_dir: Path, tmp_path: Path
) -> None:
    for name in ("model", "flipped"):
        load_tokenizer(tokenizer_dir).save_pretrained(write_model(tmp_path / name, tied=False))
    file = tmp_path / "flipped" / "model.safetensors"
    tensors = load_file(file)
    # The lowest bit of a frozen weight: nothing that a loss would show.
    flip_bit(tensors["model.layers.0.mlp.down_proj.weight"], 0)
    save_file(tensors, file, metadata={"format": "pt"})
    fields = {"checkpoint__every_steps": 3, "eval__every_steps": None}
    config = make_config(
        model__path=str(tmp_path / "model"), scale__compare_every_steps=3, **fields
    )
    flipped = override(config, {"model.path": str(tmp_path / "flipped")})
    with pytest.raises(AssertionError, match="ReplicaError: after step 3"):
        two.run(config, others={1: flipped})
    assert len(curve(config, LOSS)) == 3
    assert not (config.run_place / "checkpoints").exists()
    unwatched = override(config, {"scale.compare_every_steps": None})
    two.run(unwatched, others={1: override(flipped, {"scale.compare_every_steps": None})})
