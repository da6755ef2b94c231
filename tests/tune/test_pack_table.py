"""Promise: the sweep's page and its table show which trials trained together."""

from raytune_llama.train.monitoring.metrics import INPUT_TOKENS, MetricsLog
from raytune_llama.tune.display import build_trial_table
from raytune_llama.tune.journal import Journal, SlotUse, TrialRecord, trial_dir
from raytune_llama.tune.pack_table import render_packs
from tests.tune.conftest import MakeSweep


def test_page_shows_the_slots_and_the_throughput_of_a_pack(make_sweep: MakeSweep) -> None:
    place = make_sweep().place
    trials = [
        TrialRecord(0, {}, "finished", {8: 2.0}, slot_uses=(SlotUse(0, 0, 100.0, 120.0),)),
        TrialRecord(1, {}, "stopped", {4: 3.0}, slot_uses=(SlotUse(0, 1, 100.0, 110.0),)),
        # Interrupted for a thousand seconds, in which nothing was computed.
        TrialRecord(
            2,
            {},
            "finished",
            {8: 2.5},
            slot_uses=(SlotUse(0, 1, 110.0, 115.0), SlotUse(0, 1, 1115.0, 1120.0)),
        ),
    ]
    for trial in trials:
        log = MetricsLog(trial_dir(place, trial.number), resumed_step=0, tensorboard=False)
        log.write(1, {INPUT_TOKENS: 200.0})
        log.close()
    page = render_packs(place, trials)
    assert "Pack 0: 3 trials in 2 slots, 25 s" in page
    assert "600 tokens, 24 tokens/s" in page
    assert page.count("<rect") == 4
    assert "trial 1: stopped at step 4" in page
    assert render_packs(place, [TrialRecord(0, {}, "finished", {8: 2.0})]) == ""


def test_table_shows_the_slot_of_each_trial_of_a_pack(make_sweep: MakeSweep) -> None:
    sweep = make_sweep()
    journal = Journal(sweep.place)

    def shown() -> list[tuple[str, list[str]]]:
        columns = build_trial_table(sweep, journal).columns
        return [(str(each.header), [str(cell) for cell in each.cells]) for each in columns]

    journal.start(0, {"lora.rank": 2})
    assert "slot" not in dict(shown())
    journal.start(1, {"lora.rank": 4})
    journal.join(1, 1, 3)
    # The newest comes first; the other has not joined.
    assert dict(shown())["slot"] == ["1/3", ""]
