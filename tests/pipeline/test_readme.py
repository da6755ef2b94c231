"""The README's config of five lines trains, and the same command sees that it is done."""

import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.conftest import ROOT, own_cluster
from tests.serve.tiny_chat import write_chat_model
from tests.train.conftest import WORDS

SMALL = ["batch.sequence_tokens=256", "max_steps=4"]
"""Overrides for a model of a few thousand parameters."""


@pytest.mark.ray
@pytest.mark.slow
def test_config_of_the_readme_trains_and_the_same_command_finds_it_finished(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    config = re.search(r"^```yaml\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    command = re.search(r"^    raytune (sft reviews\.yaml.*)$", readme, re.MULTILINE)
    assert config
    assert command
    (tmp_path / "reviews.yaml").write_text(config[1], encoding="utf-8")
    (tmp_path / "demo" / "instructions").mkdir(parents=True)
    write_chat_model(
        tmp_path / "demo" / "model",
        tokenizer_dir,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    write_conversations(tmp_path / "demo" / "instructions" / "reviews.jsonl")

    arguments = [*shlex.split(command[1], comments=True), *SMALL]
    raytune = [sys.executable, "-c", "from raytune_llama.cli import main; main()", *arguments]
    for _ in range(2):
        done = subprocess.run(
            raytune, cwd=tmp_path, env=own_cluster(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert f"finished at step 4; run directory: {tmp_path / 'runs/reviews'}\n" in done.stdout
    assert (tmp_path / "runs/reviews/sft_lora_model/adapter_model.safetensors").is_file()


def write_conversations(file: Path) -> None:
    """Write 100 questions, each with an answer."""
    generator = random.Random(1)
    with file.open("w", encoding="utf-8") as output:
        for _ in range(100):
            question, answer = (" ".join(generator.choices(WORDS, k=6)) for _ in range(2))
            output.write(json.dumps({"instruction": question, "output": answer}) + "\n")
