"""Finished rows survive whatever happens to their driver, each of them once."""

import json
from typing import Any

from raytune_llama.generate.parts import Parts
from raytune_llama.storage.lease import Fence
from raytune_llama.storage.place import Place


def record(index: int, **fields: Any) -> str:  # noqa: ANN401
    answered = {"output": f"answer {index}", "finish_reason": "stop", "num_prompt_tokens": 3}
    return json.dumps({"index": index, **answered, "num_output_tokens": 2, **fields})


def unanswered(index: int, reason: str) -> str:
    return record(index, output=None, finish_reason=reason, num_output_tokens=0, error="why")


def test_parts_are_read_back_and_published_in_the_order_of_the_input(run_dir: Place) -> None:
    fence = Fence(run_dir, 1)
    parts = Parts(run_dir)
    parts.add([record(4), record(0)], fence)
    parts.flush(fence)
    again = Parts(run_dir)
    assert again.finished == {0, 4}
    again.add([record(1, output="人\u2028民"), unanswered(3, "too_long")], fence)
    again.add([unanswered(2, "unusable")], fence)
    again.flush(fence)
    last = Parts(run_dir)
    assert last.counts == again.counts
    assert (last.counts.rows, last.counts.too_long, last.counts.unusable) == (5, 1, 1)
    assert (last.counts.prompt_tokens, last.counts.output_tokens) == (9, 6)
    assert [row["index"] for row in last.counts.unanswered] == [3, 2]
    written = [json.loads(line) for line in last.publish().read_bytes().split(b"\n")[:-1]]
    assert [row["index"] for row in written] == [0, 1, 2, 3, 4]
    assert written[1]["output"] == "人\u2028民"
    last.delete()
    assert not Parts(run_dir).finished
    assert (run_dir / "outputs.jsonl").exists()


def test_rows_that_are_not_written_yet_are_not_finished_for_another_driver(run_dir: Place) -> None:
    fence = Fence(run_dir, 1)
    parts = Parts(run_dir)
    parts.add([record(0)], fence)
    assert parts.finished == {0}
    assert not Parts(run_dir).finished
    # A torn write leaves a temporary file, which is no part.
    (run_dir / "parts" / ".000000.jsonl.1.tmp").write_bytes(b'{"index"')
    parts.flush(fence)
    assert Parts(run_dir).finished == {0}
