"""Promise: a process is killed only if it is the one that was meant."""

import json
import subprocess
import sys
from dataclasses import replace

from raytune_llama.storage.process import ProcessIdentity

SLEEPER = """
import sys, time
from raytune_llama.storage.process import ProcessIdentity
import json
print(json.dumps(ProcessIdentity.current().to_json()), flush=True)
time.sleep(600)
"""


def test_process_is_known_killed_and_gone() -> None:
    command = [sys.executable, "-c", SLEEPER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        process = ProcessIdentity.from_json(json.loads(child.stdout.readline()))
        assert process.has_exited is False
        # Another process that has its number by now, and one of another machine.
        later, elsewhere = replace(process, started=process.started - 1), replace(process, boot="x")
        assert (later.has_exited, elsewhere.has_exited) == (True, None)
        assert not later.kill()
        assert not elsewhere.kill()
        assert child.poll() is None
        assert process.kill()
        assert child.wait(60) == -9
        assert process.has_exited
        assert not process.kill()
