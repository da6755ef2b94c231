"""JSON from strangers: the same as Python reads, or refused."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.serve.http.request_guard import measure_depth, read_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=30,
)


def depth_of(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 0


@given(VALUES, st.booleans())
def test_what_is_json_is_read_as_it_is(value: object, as_ascii: bool) -> None:  # noqa: FBT001
    body = json.dumps(value, ensure_ascii=as_ascii).encode()
    assert measure_depth(body) == depth_of(value)
    assert read_json(body, 100) == value


@given(st.binary(max_size=200) | st.text('[]{}"\\,:1nulNaI', max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        read_json(body, 100)
    except ValueError:
        return
    json.loads(body)


@pytest.mark.parametrize("unit", [b'\\"', b'"', b"\\", b'"\\', b"[", b'{"a":', b"[]", b'"["'])
def test_depth_is_measured_in_time_linear_in_the_text(unit: bytes) -> None:
    def seconds(num_bytes: int) -> float:
        body = b'"' + unit * (num_bytes // len(unit))
        begin = time.process_time()
        measure_depth(body)
        return time.process_time() - begin

    # Quadratic, four times the text would take sixteen times as long, and minutes.
    assert seconds(2**20) < 1.5


def test_key_twice_in_one_object_is_refused_and_in_two_is_not() -> None:
    with pytest.raises(ValueError, match="duplicate key 'a'"):
        read_json(b'[{"a": 1, "a": 1}]', 9)
    assert read_json(b'[{"a": 1}, {"a": 1}]', 9) == [{"a": 1}, {"a": 1}]


def test_whole_surrogate_pairs_are_read() -> None:
    assert read_json(rb'"\ud83e\udd8a"', 9) == "\N{FOX FACE}"
    with pytest.raises(ValueError, match="surrogate"):
        read_json(rb'"\ud83e"', 9)
