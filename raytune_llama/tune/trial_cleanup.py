"""Frees what the workers of a trial have reserved, once Tune has ended the trial's process."""

import threading

from raytune_llama.storage.place import Place
from raytune_llama.train.orchestration.placement_group import WorkerPlacement
from raytune_llama.tune.journal import trial_dir


class TrialCleanup:
    """One thread for each trial that has ended: each waits for the end of the trial's processes."""

    def __init__(self, sweep_dir: Place) -> None:
        self._sweep_dir = sweep_dir
        # Tune pickles its callbacks before the first trial: no pool, whose queue it could not.
        self._threads: list[threading.Thread] = []

    def start(self, number: int) -> None:
        """Begin to free a trial's workers."""
        # Read now: a trial that is started again writes down other workers.
        reserved = WorkerPlacement.read(trial_dir(self._sweep_dir, number))
        if reserved is not None:
            thread = threading.Thread(target=reserved.release, name=f"free-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def wait(self) -> None:
        """Wait for every clean-up that was started; each takes `END_SECONDS` at most."""
        for thread in self._threads:
            thread.join()
