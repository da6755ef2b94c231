"""Promise: all trials of a sweep have trained on the same data, or it is refused."""

from pathlib import Path

import pytest

from raytune_llama.config.settings import ConfigError, identity, override, to_dict, write_yaml
from raytune_llama.data.build.preparation import describe_inputs, open_data
from raytune_llama.data.store.manifest import fingerprint_of
from raytune_llama.train.identity import IDENTITY_FILE, identify
from raytune_llama.tune.config import load_base
from raytune_llama.tune.journal import Journal
from raytune_llama.tune.sweep import run_sweep
from tests.train.conftest import MakeConfig
from tests.tune.conftest import MakeSweep


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
    known = {"sweep": identity(sweep), "base": identify(base), "eval": to_dict(base.eval)}
    (sweep.place / IDENTITY_FILE).write_json({**known, "store": fingerprint_of(store)})
    assert run_sweep(sweep).status == "finished"
    corpus.write_text("another line of text\n" * 20)
    with pytest.raises(ConfigError, match=r"sweep_dir: .*\nstore: "):
        run_sweep(sweep)
    # Earlier versions have not recorded what the trials were trained on.
    (sweep.place / IDENTITY_FILE).write_json(known)
    assert run_sweep(sweep).status == "finished"
