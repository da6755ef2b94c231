"""Promise: all trials of a sweep have trained on the same data, or it is refused."""

from pathlib import Path

import pytest

from raytune_llama.config.settings import ConfigError, override, write_yaml
from raytune_llama.data.build.preparation import describe_inputs, open_data
from raytune_llama.data.store.manifest import fingerprint_of
from raytune_llama.train.identity import IDENTITY_FILE
from raytune_llama.tune.config import load_base
from raytune_llama.tune.journal import Journal
from raytune_llama.tune.search import check_samples
from raytune_llama.tune.sweep import _resolve_samples, identify_sweep, plan_sweep, run_sweep
from tests.hub_server import HubServer
from tests.train.conftest import MakeConfig
from tests.tune.conftest import MakeSweep


def test_models_of_samples_are_found_on_the_hub_before_a_trial_and_without_weights(
    make_sweep: MakeSweep, model_dir: Path, tmp_path: Path, hub: HubServer
) -> None:
    files = {file.name: file.read_bytes() for file in model_dir.iterdir()}
    commits = {repo: hub.publish(repo, files) for repo in ("org/a", "org/b")}
    fields = {"fixed": {"model.tokenizer": str(model_dir)}, "search": {"kind": "grid"}}
    (tmp_path / "corpus.txt").write_text("one line of text\n" * 20)
    space = {"model.path": {"choice": ["org/a", "hf://org/b"]}}
    sweep = make_sweep(space=space, num_trials=2, **fields)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert plan_sweep(sweep)
        pinned = [
            one.model.path for one in _resolve_samples(check_samples(sweep, load_base(sweep)))
        ]
        assert pinned == [f"hf://{repo}@{commit}?ref=main" for repo, commit in commits.items()]
        assert hub.sent_of(files["model.safetensors"]) == 0
        space = {"model.path": {"choice": ["org/a", "org/misspelled"]}}
        with pytest.raises(ConfigError, match=r"no model org/misspelled"):
            plan_sweep(make_sweep(space=space, num_trials=2, **fields))


def test_finished_sweep_with_edited_data_is_not_finished(
    make_sweep: MakeSweep, make_config: MakeConfig, tmp_path: Path
) -> None:
    sweep = make_sweep(num_trials=1)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("one line of text\n" * 20)
    config = make_config(data__sources=[{"path": str(corpus)}])
    write_yaml(config, Path(sweep.base))
    journal = Journal(sweep.place)
    journal.start(0, {"optim.learning_rate": 1e-3, "lora.rank": 2, "lora.alpha": 4.0})
    journal.report(0, 12, 2.5, 1.0)
    journal.end(0, "finished")
    base = override(load_base(sweep), {"run_dir": sweep.sweep_dir})
    store = describe_inputs(base.data, open_data(base.data, Path(base.model.path)))
    known = identify_sweep(sweep, base, {})
    (sweep.place / IDENTITY_FILE).write_json({**known, "store": fingerprint_of(store)})
    assert run_sweep(sweep).status == "finished"
    corpus.write_text("another line of text\n" * 20)
    with pytest.raises(ConfigError, match=r"sweep_dir: .*\nstore: "):
        run_sweep(sweep)
    # Earlier versions have not recorded what the trials were trained on.
    (sweep.place / IDENTITY_FILE).write_json(known)
    assert run_sweep(sweep).status == "finished"
