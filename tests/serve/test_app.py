"""The endpoint on Ray Serve: one model, and several behind their gateway."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from raytune_llama.config.settings import ConfigError, load
from raytune_llama.serve.app import build_app, build_apps
from raytune_llama.serve.config import KeyLimits, ReplicaConfig, ServeConfig, ServedModelConfig
from raytune_llama.serve.generation.model import ServedModel
from tests.serve.engine.test_scheduler import by_transformers
from tests.serve.many_clients import wait_until
from tests.serve.test_scaling import url

__all__ = ["url"]


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def two_models(served_dir: Path, **fields: Any) -> ServeConfig:  # noqa: ANN401  # a config's fields
    models = tuple(
        ServedModelConfig(path=str(served_dir), name=name, template="belle")
        for name in ("left", "org/right")
    )
    return ServeConfig(models=models, replicas=ReplicaConfig(cpus=0.5), **fields)


def test_several_models_are_applications_at_their_names_and_a_gateway(served_dir: Path) -> None:
    apps = [(one.name, one.route_prefix) for one in build_apps(two_models(served_dir))]
    assert apps == [("left", "/left"), ("org/right", "/org/right"), ("gateway", "/")]


def test_several_models_in_one_application_are_refused(served_dir: Path) -> None:
    with pytest.raises(ConfigError, match="models: got 2, but an application has one"):
        build_app(two_models(served_dir))


@pytest.mark.parametrize("name", ["v1", "v1/x", "health", "a//b", "/a", "a/", "a?b", "a%2f", "人"])
def test_name_that_cannot_be_a_path_is_refused_among_several_models(
    served_dir: Path, name: str
) -> None:
    models = [{"path": str(served_dir), "name": name}, {"path": str(served_dir)}]
    with pytest.raises(ConfigError, match=r"can't be a path of the endpoint's URL|no URL can have"):
        load(ServeConfig, [f"models={json.dumps(models)}"])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_endpoint_answers_as_the_model_and_streams(
    url: str, served_dir: Path, served: ServedModel
) -> None:
    model = ServedModelConfig(path=str(served_dir), template="belle")
    serve.run(build_app(ServeConfig(models=(model,))), name="llm")
    client = client_of(url)
    asked: dict[str, Any] = {"model": "tiny", "prompt": "the quick", "max_tokens": 9}
    asked["temperature"] = 0
    told = client.completions.create(**asked)
    ids = served.tokenizer.encode("the quick")
    tokens = by_transformers(served.model, ids, 9)
    tokens = tokens[: tokens.index(1)] if 1 in tokens else tokens
    assert told.choices[0].text == served.tokenizer.decode(tokens)
    streamed = client.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == told.choices[0].text
    with pytest.raises(openai.BadRequestError, match="is 128 tokens"):
        client.completions.create(model="tiny", prompt="x " * 500)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="none", prompt="x")


def exported_metrics() -> dict[tuple[str, str, str], float]:
    """The endpoint's metrics as Ray exports them: by name, model and outcome, over replicas."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text = response.read().decode()
    sums: dict[tuple[str, str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_raytune_llama_"):
                labels = sample.labels
                key = (sample.name, labels.get("model", ""), labels.get("outcome", ""))
                sums[key] = sums.get(key, 0.0) + sample.value
    return sums


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_models_behind_a_gateway_share_the_limits_of_keys_and_export_their_metrics(
    url: str, served_dir: Path
) -> None:
    # One after the other is admitted, whichever model they ask for.
    config = two_models(served_dir, key_limits=KeyLimits(requests_per_minute=3))
    for one in build_apps(config):
        serve.run(one.app, name=one.name, route_prefix=one.route_prefix)
    client = client_of(url)
    assert [model.id for model in client.models.list()] == ["left", "org/right"]
    asked: dict[str, Any] = {"prompt": "the quick", "max_tokens": 9, "temperature": 0}
    told = client.completions.create(model="left", **asked)
    same = client.completions.create(model="org/right", **asked)
    assert same.model == "org/right"
    assert same.choices == told.choices
    direct = client_of(f"{url}/org/right")
    assert [model.id for model in direct.models.list()] == ["org/right"]
    assert direct.completions.create(model="org/right", **asked).choices == told.choices
    for other in (client, direct):
        with pytest.raises(openai.RateLimitError) as refused:
            other.completions.create(model="org/right", **asked)
        assert int(refused.value.response.headers["Retry-After"]) >= 1
    answers = "ray_raytune_llama_answers_total"

    def counts() -> tuple[float, float]:
        found = exported_metrics()
        return found.get((answers, "left", "ok"), 0), found.get((answers, "org/right", "ok"), 0)

    wait_until(lambda: counts() == (1, 2), seconds=60, what="metrics of both models")
