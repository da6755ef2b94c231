"""Promises: an encoder's ids are the reference's, and a worker uses what the driver looked at."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest

from raytune_llama.model.encoder import EncoderChoice, build_encoder, choose_encoder
from raytune_llama.model.tokenizer import load_reference
from tests.model.conftest import SENTENCES


@pytest.fixture(params=["tokenizer_dir", "llama_tokenizer_dir", "merged_tokenizer_dir"])
def any_dir(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_choice_goes_to_a_worker_as_a_pickle_and_into_a_manifest_as_json(any_dir: Path) -> None:
    choice = choose_encoder(any_dir, SENTENCES, "reference")
    assert pickle.loads(pickle.dumps(choice)) == choice  # noqa: S301
    assert EncoderChoice(**json.loads(json.dumps(dataclasses.asdict(choice)))) == choice


def test_build_encoder_of_the_reference_gives_its_ids(any_dir: Path) -> None:
    encoder = build_encoder(any_dir, choose_encoder(any_dir, SENTENCES, "reference"))
    reference = load_reference(any_dir)
    assert (encoder.name, encoder.version) == (reference.name, reference.version)
    texts = [*SENTENCES, ""]
    wanted = [ids.tolist() for ids in reference.encode(texts)]
    assert [ids.tolist() for ids in encoder.encode(texts)] == wanted


def test_build_encoder_of_another_tokenizer_than_the_drivers_is_refused(
    merged_tokenizer_dir: Path, piece_model: Path
) -> None:
    choice = choose_encoder(merged_tokenizer_dir, SENTENCES, "reference")
    shutil.copy(piece_model, merged_tokenizer_dir)
    with pytest.raises(ValueError, match="on this node"):
        build_encoder(merged_tokenizer_dir, choice)
