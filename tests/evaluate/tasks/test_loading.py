"""Promise: all questions are read and checked before a model is loaded, all mistakes together."""

# ruff: noqa: RUF001  # Chinese punctuation

import logging
import pickle
from pathlib import Path

import pytest

from raytune_llama.config.settings import ConfigError, from_dict
from raytune_llama.evaluate.tasks.config import TaskConfig
from raytune_llama.evaluate.tasks.loading import load_tasks
from raytune_llama.evaluate.tasks.subjects import CEVAL, CMMLU
from tests.evaluate.tasks.conftest import LAW, exam_text, task_config


def test_ceval_folder_yields_a_task_per_subject_with_its_group(ceval_dir: Path) -> None:
    tasks = load_tasks([task_config(ceval_dir, "ceval", shots=2, limit=1)])
    law, logic = tasks
    assert [task.name for task in tasks] == ["ceval/law", "ceval/logic"]
    assert (law.group, law.title, law.num_questions) == ("Humanities", "法学", 1)
    assert [shot.text for shot in logic.shots] == [
        "所有的鱼都会游泳，鲤鱼是鱼，所以？",
        "“如果下雨，地面就湿”，地面没有湿，所以？",
    ]
    assert set(law.file_hashes) == {"val/law_val.csv", "dev/law_dev.csv"}
    assert pickle.loads(pickle.dumps(tasks)) == tasks  # noqa: S301 - as Ray sends them


def test_test_split_without_answers_is_a_submission_unless_answers_are_needed(
    ceval_dir: Path,
) -> None:
    config = task_config(ceval_dir, "ceval", split="test")
    assert not any(task.has_answers for task in load_tasks([config]))
    with pytest.raises(ConfigError, match=r"tasks\.0\.split: ceval test has no answers"):
        load_tasks([config], need_answers=True)


def test_unknown_subject_counts_as_other_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "rocketry.csv").write_text(exam_text(LAW), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        (task,) = load_tasks([task_config(tmp_path, "cmmlu")])
    assert task.group == "Other"
    assert "rocketry" in caplog.text


def test_folder_of_calm_files_yields_a_task_per_file(tmp_path: Path, calm_file: Path) -> None:
    (tmp_path / "README.md").write_text("# data")
    (tmp_path / "lending.jsonl").write_bytes(calm_file.read_bytes())
    tasks = load_tasks([task_config(tmp_path, "calm", name="credit")])
    assert [task.name for task in tasks] == ["credit/german", "credit/lending"]
    (single,) = load_tasks([task_config(calm_file, "calm")])
    assert (single.name, single.subject) == ("german", None)


def test_all_mistakes_are_reported_together(ceval_dir: Path, calm_file: Path) -> None:
    (ceval_dir / "val" / "law_val.csv").write_text("id,question,A,B,C,D\n0,q,1,2,3,4\n")
    (ceval_dir / "val" / "logic_val.csv").write_text("", encoding="utf-8")
    calm_file.write_text("{")
    with pytest.raises(ConfigError) as error:
        load_tasks(
            [
                task_config(ceval_dir, "ceval"),
                task_config(ceval_dir, "ceval", shots=5, subjects=["logik"]),
                task_config(calm_file, "calm"),
                task_config(ceval_dir / "none", "cmmlu"),
                task_config(ceval_dir / "none.jsonl", "choices"),
            ],
            "evaluate.tasks",
        )
    text = str(error.value)
    assert f"evaluate.tasks.0.path: {ceval_dir}/val/law_val.csv: no column answer" in text
    assert f"evaluate.tasks.0.path: {ceval_dir}/val/logic_val.csv: the file is empty" in text
    assert "evaluate.tasks.1.subjects: " in text
    assert "did you mean logic?" in text
    assert "evaluate.tasks.2.path: " in text
    assert "line 1: invalid JSON" in text
    assert "evaluate.tasks.3.path: no CSV file in" in text
    assert "evaluate.tasks.4.path: no file matches" in text


def test_more_shots_than_examples_are_refused(ceval_dir: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_tasks([task_config(ceval_dir, "ceval", shots=5)])
    assert error.value.problems == [
        f"tasks.0.shots: got 5, but {ceval_dir}/dev/law_dev.csv has 4 rows",
        f"tasks.0.shots: got 5, but {ceval_dir}/dev/logic_dev.csv has 2 rows",
    ]


def test_two_benchmarks_of_the_same_name_are_refused(ceval_dir: Path) -> None:
    config = task_config(ceval_dir, "ceval")
    with pytest.raises(ConfigError, match=r"tasks\.1\.name: another task is also named ceval/law"):
        load_tasks([config, config])


def test_subjects_of_both_benchmarks_are_complete() -> None:
    assert {group: len(of) for group, of in CEVAL.items()} == {
        "STEM": 20,
        "Social": 10,
        "Humanities": 11,
        "Other": 11,
    }
    assert sum(map(len, CMMLU.values())) == 67


def test_unknown_lm_eval_task_is_refused_with_the_nearest_name() -> None:
    config = from_dict(TaskConfig, {"task": "arc_eazy"})
    with pytest.raises(ConfigError, match="did you mean arc_easy"):
        load_tasks([config])


def test_lm_eval_task_without_its_data_is_refused() -> None:
    config = from_dict(TaskConfig, {"task": "arc_easy"})
    with pytest.raises(ConfigError, match=r"tasks\.0\.task: .* cannot be loaded"):
        load_tasks([config])
