"""The reference has every field and metric, and the schemas take what the jobs take."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from docs.make_reference import (
    ROOT,
    SCHEMAS,
    build_schema,
    default_config_of,
    find_sections,
    render_config,
    roots_of,
)
from docs.reference_tables import (
    is_resumable,
    log_messages,
    render_http,
    render_log_messages,
    render_metrics,
)
from raytune_llama.cli import VERBS
from raytune_llama.config import fields, yaml12
from raytune_llama.train.monitoring.metrics import EvaluationResult, evaluation_metrics

CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
WITH_CONFIG = [verb for verb in VERBS if roots_of(verb)]


def schema_of(config: Path) -> Path:
    """Return the schema that a config names in its first line, as editors find it."""
    first, _, _ = config.read_text(encoding="utf-8").partition("\n")
    named = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert named is not None, f"{config.name}: no schema in the first line"
    return (config.parent / named[1]).resolve()


def read(config: Path) -> dict[str, Any]:
    data, problems = yaml12.read_mapping(config)
    assert data is not None, problems
    assert not problems
    return data


def settings_in(data: dict[str, Any], verb: str) -> Iterator[dict[str, Any]]:
    """Yield the mappings of a config that hold the fields of a settings class, the root first."""
    for section in (section for root in roots_of(verb) for section in find_sections(root)):
        here: Any = data
        for name in section.path.split(".") if section.path else ():
            here = here.get(name) if isinstance(here, dict) else None
        if isinstance(here, dict):
            yield here


@pytest.mark.parametrize("verb", WITH_CONFIG)
def test_page_of_a_verb_has_every_field_with_its_docstring(verb: str) -> None:
    page = render_config(verb)
    for root in roots_of(verb):
        for path, field in fields.walk_fields(root):
            assert f"`{path}` | " in page
            assert " ".join((field.description or "?").split())[:20].replace("|", "\\|") in page


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_schema_takes_a_shipped_config_and_refuses_misspelt_fields(config: Path) -> None:
    verb = schema_of(config).stem
    schema = build_schema(verb)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    data = read(config)
    assert not [error.message for error in validator.iter_errors(data)]
    for inner in settings_in(data, verb):
        inner["no_such_field"] = 1
        assert not validator.is_valid(data), inner
        del inner["no_such_field"]
    assert validator.is_valid(data)


@pytest.mark.parametrize("verb", [verb for verb in WITH_CONFIG if default_config_of(verb)])
def test_default_config_of_a_verb_names_the_schema_of_that_verb(verb: str) -> None:
    config = ROOT / "jobs" / "configs" / str(default_config_of(verb))
    assert schema_of(config) == SCHEMAS / f"{verb}.json"


@pytest.mark.parametrize(
    ("path", "value"),
    [("optim", {"learning_rate": "fast"}), ("max_steps", -1), ("train", "qlora")],
)
def test_schema_refuses_values_that_the_job_refuses(path: str, value: object) -> None:
    data: Any = {**read(ROOT / "jobs" / "configs" / "pretrain_smollm2.yaml"), path: value}
    assert not jsonschema.Draft202012Validator(build_schema("pretrain")).is_valid(data)


def test_metrics_page_has_what_an_evaluation_records() -> None:
    page = render_metrics()
    texts = [EvaluationResult(name, math.log(2), 1, 1) for name in ("a", "b")]
    for prefix in ("eval", "eval/text"):
        for name in evaluation_metrics(texts, prefix):
            documented = re.sub("/[ab]$", "/NAME", name)
            assert f"`{documented}`" in page or prefix == "eval/text", documented
    assert "`ray_raytune_llama_http_requests_total` | counter | `route`, `status`" in page


def test_http_page_has_routes_fields_and_refusals() -> None:
    page = render_http()
    for route in ("POST /v1/chat/completions", "GET /v1/models", "GET /health", "GET /"):
        assert f"| `{route}` |" in page
    assert "| `top_k` |" in page
    assert "`previous_response_id`" in page


def test_log_messages_are_those_of_the_source_with_a_mark_for_values() -> None:
    source = """
logger.warning("step %d: %.4f is 5 %% above", 1, 2.0)
logger.info("%s", text)
text.info("no message of the log")
FEW = "%d workers"
def start():
    what = f"starting {count}"
    with waiting(logger, what, usually="5 s"):
        logger.error(FEW, 1)
"""
    assert sorted(log_messages(source)) == [
        ("error", "… workers"),
        ("info", "starting …; usually takes 5 s"),
        ("warning", "step …: … is 5 % above"),
    ]
    page = render_log_messages()
    assert "| info | `resumed from … after step …` |" in page
    assert "| warning | `` the cluster was started without …: Ray Serve's own proxy is used" in page


def test_verbs_that_resume_are_those_that_keep_work() -> None:
    assert {
        verb for verb in ("pretrain", "sft", "sweep", "merge", "serve") if is_resumable(verb)
    } == {
        "pretrain",
        "sft",
        "sweep",
    }
