"""Fields of docs/migrating.md exist, and its example config is accepted."""

import re
from pathlib import Path

import pytest

from raytune_llama.cli import config_classes
from raytune_llama.config import fields, yaml12
from raytune_llama.config.settings import from_dict
from raytune_llama.train.config import SftConfig

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith(("| `", "| ("))
]
HERE = sorted({name for row in ROWS for name in re.findall("`([^`]+)`", row[1])})
KNOWN = {path for kind in config_classes().values() for path, _ in fields.walk_fields(kind)}


def test_tables_have_three_columns_and_a_field_or_a_dash() -> None:
    assert len(ROWS) > 100
    assert not [
        row for row in ROWS if len(row) not in {2, 3} or not (row[1] == "-" or "`" in row[1])
    ]


@pytest.mark.parametrize("field", HERE)
def test_field_that_a_table_names_exists(field: str) -> None:
    assert field in KNOWN


def test_fields_in_remarks_exist() -> None:
    named = set(re.findall(r"`([a-z_]+(?:\.[a-zN_]+)+)`", PAGE))
    files = {name for name in named if name.endswith((".py", ".json", ".jsonl", ".yaml", ".jinja"))}
    assert not named - files - KNOWN


def test_example_config_is_accepted_and_has_the_batch_of_theirs() -> None:
    example = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    data, problems = yaml12.parse_mapping(example[0], "example")
    assert data is not None
    assert not problems
    config = from_dict(SftConfig, data)
    assert config.batch.sequences_per_step == 2 * 8 * 4
