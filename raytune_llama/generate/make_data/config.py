"""Settings of the `make_data` job: endpoint, prompts, budgets, and what a row must be like."""

from importlib.util import find_spec
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, JsonValue, model_validator

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import PLACEMENT, ConfigError, identity, settings

_OWN_PARAMETERS = ("model", "messages", "temperature", "top_p", "max_tokens", "stream", "n")

_PACKAGES = ("openai", "json_repair", "rapidfuzz")


@settings
class PromptConfig:
    """What a prompt asks for. Topics, task types and length limits are drawn per request."""

    language: Literal["zh", "en"] = "zh"
    """Language of the prompt and of the rows: Chinese or English."""

    topics: Annotated[str | None, PLACEMENT] = None
    """Text file with one topic per line; null: 82 topics that the package contains. A resumed job
    compares its content, not its path."""

    task_types: Annotated[str | None, PLACEMENT] = None
    """Text file with one task type per line; null: 14 task types that the package contains."""

    num_topics: Annotated[int, Field(ge=1)] = 10
    """Number of topics in a prompt."""

    num_task_types: Annotated[int, Field(ge=1)] = 10
    """Number of task types in a prompt."""

    num_items: Annotated[int, Field(ge=1, le=200)] = 20
    """Number of rows that a prompt asks for."""

    input_chars: tuple[int, int] = (80, 120)
    """Range of the longest input that a prompt allows, in characters."""

    output_chars: tuple[int, int] = (128, 512)
    """Range of the longest output that a prompt allows, in characters."""

    seed: int = 1
    """Seed of the draws: request number and seed determine a prompt."""

    @model_validator(mode="after")
    def _check(self) -> "PromptConfig":
        problems = [
            f"{name}: got [{low}, {high}], wanted two positive numbers, the smaller one first"
            for name, (low, high) in (
                ("input_chars", self.input_chars),
                ("output_chars", self.output_chars),
            )
            if not 1 <= low <= high
        ]
        if problems:
            raise ConfigError(problems)
        return self


@settings
class SamplingConfig:
    """Parameters of the endpoint's sampling; null: its default."""

    temperature: Annotated[float, Field(ge=0)] | None = 1.0
    """Sampling temperature."""

    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Probability mass of nucleus sampling."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of tokens of a reply. If it is too small, replies are cut off: their complete
    items are kept."""

    extra_body: dict[str, JsonValue] = Field(default_factory=dict)
    """Other fields to send with each request, such as `{max_completion_tokens: 8000}` or `{top_k:
    50}`."""

    @model_validator(mode="after")
    def _check(self) -> "SamplingConfig":
        problems = [
            f"extra_body.{name}: is set by this job; remove it, or use the field of that name"
            for name in self.extra_body
            if name in _OWN_PARAMETERS
        ]
        if problems:
            raise ConfigError(problems)
        return self


@settings
class FilterConfig:
    """Rules that a row must pass; other rows are written to the quarantine."""

    max_rouge_l: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Maximum similarity of a row's instruction to every instruction that is kept: F-measure of
    ROUGE-L on words; a character of Chinese is a word."""

    length_tolerance: Annotated[float, Field(ge=1)] = 1.5
    """Ratio to the prompt's limit at which an input or output is too long."""

    max_instruction_chars: Annotated[int, Field(ge=1)] = 500
    """Maximum length of an instruction, in characters."""


@settings
class MakeDataConfig:
    """Instruction data to make with any OpenAI-compatible endpoint, as rows for `raytune sft`."""

    run_dir: Annotated[str, Field(min_length=1), PLACEMENT]
    """Local directory of the result, `alpaca.json`, with records beside it. The same command with
    the same directory resumes the job."""

    base_url: Annotated[str, PLACEMENT] = "http://127.0.0.1:8000/v1"
    """Base URL of the API, up to /v1."""

    model: Annotated[str, Field(min_length=1)] | None = None
    """Model, or model:adapter; null: the endpoint's only model."""

    api_key_variable: Annotated[str | None, PLACEMENT] = "OPENAI_API_KEY"
    """Environment variable with the API key; it may be unset if the endpoint is on this machine.
    Null: no key is sent."""

    prompt: PromptConfig = PromptConfig()
    """Prompts."""

    sampling: SamplingConfig = SamplingConfig()
    """Sampling parameters."""

    filter: FilterConfig = FilterConfig()
    """Rules for rows."""

    num_rows: Annotated[int | None, Field(ge=1), PLACEMENT] = None
    """Number of rows after which no request is sent. The last reply's rows are all kept, so that
    there may be a few more. Null: only the budgets below end the job."""

    max_requests: Annotated[int | None, Field(ge=1), PLACEMENT] = None
    """Budget of requests, over all starts of the job; retries are not counted."""

    max_tokens: Annotated[int | None, Field(ge=1), PLACEMENT] = None
    """Budget of prompt and completion tokens together, over all starts of the job, as the endpoint
    reports them. Requests that are being answered when it is used up may exceed it slightly."""

    concurrency: Annotated[int, Field(ge=1, le=1000), PLACEMENT] = 4
    """Number of concurrent requests."""

    timeout_seconds: Annotated[float, Field(gt=0), PLACEMENT] = 600.0
    """Seconds without data from the endpoint after which a request is repeated."""

    max_tries: Annotated[int, Field(ge=1), PLACEMENT] = 8
    """Tries of one request if the endpoint limits the rate (429), fails (5xx), does not answer in
    time or drops the connection."""

    max_fruitless_requests: Annotated[int, Field(ge=1), PLACEMENT] = 20
    """Consecutive replies without a row to keep, after which the job stops: the model does not
    follow the prompt, or has nothing new to say."""

    @model_validator(mode="after")
    def _check(self) -> "MakeDataConfig":
        problems = check_url(self.base_url)
        if self.num_rows is None and self.max_requests is None and self.max_tokens is None:
            problems.append("num_rows: set it, or one of the budgets max_requests and max_tokens")
        if problems:
            raise ConfigError(problems)
        return self

    @property
    def is_on_this_machine(self) -> bool:
        """Whether the endpoint's address is one of this machine's loopback addresses."""
        return urlsplit(self.base_url).hostname in {"localhost", "127.0.0.1", "::1"}


def check_url(url: str) -> list[str]:
    """Return the problems of a base URL: one line each, starting with `base_url`."""
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # unclosed bracket, invalid port
        is_url, parts = False, urlsplit("")
    if not is_url:
        return [f"base_url: got {url!r}, wanted e.g. http://127.0.0.1:8000/v1"]
    if parts.username or parts.password or parts.query:
        return [
            "base_url: contains a user name, a password or a query; put the key into the "
            "environment variable that api_key_variable names"
        ]
    return []


def check_packages() -> None:
    """Check that the packages of the extra `make-data` are installed, without importing them.

    Raises:
        UserError: One is missing; the message says how to install it.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(
            f"making data needs {', '.join(missing)}: pip install 'raytune_llama[make-data]'"
        )


def check_key(config: MakeDataConfig, key: str | None) -> list[str]:
    """Return what is wrong with an API key: one line each, starting with a field.

    Args:
        config: Config of the job.
        key: Value of the environment variable that the config names; None if it is not set.
    """
    variable = config.api_key_variable
    if variable is None:
        return []
    if key is None and not config.is_on_this_machine:
        return [
            f"api_key_variable: the environment variable {variable} is not set; set it to an API "
            "key of the endpoint, or api_key_variable=null to send none"
        ]
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        return [
            f"api_key_variable: the environment variable {variable} contains a space or a "
            "character that no API key has; copy it again"
        ]
    return []


def describe_identity(config: MakeDataConfig, model: str, hashes: dict[str, str]) -> dict[str, Any]:
    """Return what the rows of a job depend on; a resumed job must have the same.

    Args:
        config: Config of the job.
        model: Name of the model, also if the config leaves it to the endpoint.
        hashes: Hash of each text that prompts are made of, by its name.
    """
    return {**identity(config), "model": model, "texts": hashes}
