"""The command: its verbs, its help, its exit statuses, and the shims in jobs/."""

import subprocess
import sys
from pathlib import Path

import pytest

from raytune_llama import __version__
from raytune_llama.cli import VERBS
from raytune_llama.config.command_line import default_config
from raytune_llama.config.errors import UserError
from raytune_llama.serve.config import expand_model_dir

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").is_file())


def raytune(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = "from raytune_llama.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )


def test_help_lists_every_verb_with_a_line() -> None:
    done = raytune("--help")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    for verb in VERBS:
        (line,) = [line for line in lines if line.startswith(f"  {verb} ")]
        assert line.endswith(".")


def test_unknown_verb_names_the_nearest_and_exits_2() -> None:
    done = raytune("pretrian")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean pretrain?" in done.stderr


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_of_every_verb_exits_0(verb: str) -> None:
    done = raytune(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert f"raytune {verb}" in done.stdout


def test_help_of_a_section_shows_that_section_alone() -> None:
    done = raytune("pretrain", "--help", "optim")
    assert done.returncode == 0
    fields = [line for line in done.stdout.splitlines() if line[:1].isalpha()]
    assert len(fields) > 5
    assert all(line.startswith("optim") for line in fields)
    assert "no section 'optym'" in raytune("pretrain", "--help", "optym").stderr


@pytest.mark.parametrize(
    "verb",
    [
        "pretrain",
        "sft",
        "sweep",
        "prepare-data",
        "expand-vocab",
        "generate",
        "make-data",
        "evaluate",
    ],
)
def test_typo_in_an_override_of_a_default_config_exits_2(verb: str) -> None:
    done = raytune(verb, "no_such_field=1")
    assert done.returncode == 2
    assert "no_such_field: no such field" in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_help_shows_the_fields_of_the_endpoint() -> None:
    done = raytune("serve", "--help")
    for field in ("models:", "replicas.max:", "limits.body_bytes:", "port:"):
        assert f"\n{field}" in done.stdout


def test_serve_with_a_typo_exits_2() -> None:
    done = raytune("serve", "model_dir=demo/model", "replicas.maxx=2")
    assert done.returncode == 2
    assert "replicas.maxx" in done.stderr


def test_model_dir_stands_for_the_only_models_path() -> None:
    assert expand_model_dir(["model_dir=a b", "port=1"]) == ['models=[{path: "a b"}]', "port=1"]


def test_serve_refuses_model_dir_beside_models() -> None:
    done = raytune("serve", "model_dir=a", "models=[{path: b}]")
    assert done.returncode == 2
    assert "both model_dir and models" in done.stderr


def test_ray_serve_config_without_a_cluster_is_refused_in_words(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("applications:\n  - import_path: raytune_llama.serve.app:app\n")
    # Called in this process: another would spend seven seconds on imports.
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9"):
        VERBS["serve"]([str(file), "address=http://127.0.0.1:9"], "raytune serve")


@pytest.mark.parametrize("job", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_every_job_is_a_shim_that_answers_for_help(job: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(job), "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert job.name in done.stdout


def test_default_configs_exist() -> None:
    assert default_config("pretrain_smollm2.yaml").is_file()


@pytest.mark.slow
def test_wheel_in_an_empty_environment_has_the_command_and_its_configs(tmp_path: Path) -> None:
    """Builds the wheel with the network's hatchling; dependencies are this environment's."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"raytune_llama-{__version__}-")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    # A folder that a .pth file names is searched after the environment's own packages.
    (site / "dependencies.pth").write_text(f"{ours}\n")
    command = [str(tmp_path / "venv" / "bin" / "raytune")]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "pretrain" in done.stdout
    done = subprocess.run(
        [*command, "pretrain", "optim.learning_rat=1"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "did you mean optim.learning_rate?" in done.stderr
    where = "import raytune_llama; print(raytune_llama.__file__)"
    done = subprocess.run(
        [str(python), "-c", where], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert str(site) in done.stdout
    assert (site / "raytune_llama" / "py.typed").is_file()
    assert (site / "raytune_llama" / "configs" / "pretrain_smollm2.yaml").is_file()
