from pathlib import Path

import pytest

from raytune_llama.config import ConfigError
from raytune_llama.serve.http.keys import Keys, make_key, read_keys


def test_key_that_was_made_is_let_in_and_no_other(tmp_path: Path) -> None:
    (key, line), (other, _) = make_key(), make_key()
    (tmp_path / "keys").write_text(f"# first\n\n{line.upper()}  # alice\n")
    keys = read_keys(tmp_path / "keys")
    assert keys.find(key)
    assert keys.find(other) is None
    assert keys.find("") is None
    assert keys.find(line) is None  # the hash is no key
    assert key not in repr(keys)


def test_no_keys_let_nobody_in_by_name() -> None:
    assert Keys().find("anything") is None


@pytest.mark.parametrize("text", ["", "# nobody\n", "sk-secret\n", "abcd\n", "g" * 64])
def test_file_without_hashes_is_refused_and_never_shown(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_keys(tmp_path / "keys")
    assert "sk-secret" not in str(caught.value)


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keys_file: .*nowhere"):
        read_keys(tmp_path / "nowhere")
