"""The command `raytune`: one verb per job, and what the programs in `jobs/` run.

    raytune pretrain my.yaml optim.learning_rate=1e-4
    raytune --help

A verb loads its config, calls one function of the package and prints where the result is. Heavy
packages are imported only after the config is accepted, so that help and mistakes answer at once.
Exit status: 0 done; 2 something that the user has to fix, listed on stderr; 75 stopped by Ctrl-C, a
closed terminal or SIGTERM, to be resumed by the same command; 130 stopped by one of them in a job
that has to start again, or by a second Ctrl-C; 1 anything else, with a traceback.
"""

import contextlib
import difflib
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar

from raytune_llama.config.command_line import default_config, describe_other_job, split_arguments
from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, load
from raytune_llama.config.yaml12 import read_mapping
from raytune_llama.logs import setup_logging, waiting
from raytune_llama.signals import EXIT_INTERRUPTED, Interruption, leave_closed_terminal

if TYPE_CHECKING:
    from raytune_llama.train.config import AnyTrainConfig

T = TypeVar("T")

EXIT_MISTAKE: Final = 2
"""The user has something to fix, which is listed on stderr."""

EXIT_STOPPED: Final = 75
"""Stopped after saving: the same command resumes. It is EX_TEMPFAIL of sysexits.h."""


def main() -> NoReturn:
    """Run `raytune VERB ...` and exit with its status."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        _show(_usage())
        sys.exit(0 if arguments else EXIT_MISTAKE)
    verb, *rest = arguments
    if verb == "--version":
        from raytune_llama import __version__

        _show(__version__)
        sys.exit(0)
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"verbs are {', '.join(VERBS)}"
        sys.stderr.write(f"raytune: no verb {verb!r}; {hint}\n")
        sys.exit(EXIT_MISTAKE)
    run(verb, rest, program=f"raytune {verb}")


def run(verb: str, argv: Sequence[str] | None = None, *, program: str | None = None) -> NoReturn:
    """Run one verb and exit with its status.

    Args:
        verb: a key of `VERBS`.
        argv: its arguments; None: those of this process.
        program: what usage messages call it; None: the name of the script.
    """
    setup_logging()
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = shlex.join([*(program or f"python {sys.argv[0]}").split(" ", 1), *arguments])
    interruption = Interruption()
    if verb != "chat":  # there, Ctrl-C stops an answer
        interruption.install()
    try:
        status = VERBS[verb](arguments, program or Path(sys.argv[0]).name)
    except UserError as error:
        sys.stderr.write(f"{_explain(error, verb, arguments)}\n")
        status = EXIT_MISTAKE
    except _ResumableInterrupt as interrupt:
        sys.stderr.write(f"stopped: {interrupt}\n")
        status = EXIT_STOPPED
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped before the end; to start again: {command}\n")
        status = EXIT_INTERRUPTED
    if status == EXIT_STOPPED:
        sys.stderr.write(f"to resume: {command}\n")
    interruption.finish()
    sys.exit(status)


def _explain(error: UserError, verb: str, arguments: list[str]) -> str:
    """Return an error's text: one line instead if the config file is another job's."""
    file, _ = split_arguments(arguments)
    if file is None or not isinstance(error, ConfigError):
        return str(error)
    data, problems = read_mapping(file)
    classes = config_classes()
    if data is None or problems or verb not in classes:
        return str(error)
    if verb == "prepare-data":  # takes training configs too
        classes = {name: cls for name, cls in classes.items() if name not in ("pretrain", "sft")}
    other = describe_other_job(data, error.problems, verb, classes)
    return str(error) if other is None else f"{file}: {other}"


def config_classes() -> dict[str, type]:
    """Return the root settings class of each verb that takes a config."""
    from raytune_llama.data.config import ConvertDataConfig, PrepareDataConfig
    from raytune_llama.evaluate.config import EvaluateConfig
    from raytune_llama.generate.config import GenerateConfig
    from raytune_llama.generate.make_data.config import MakeDataConfig
    from raytune_llama.merge.config import MergeConfig
    from raytune_llama.model.meta.config import ConvertConfig
    from raytune_llama.serve.client.config import TerminalConfig
    from raytune_llama.serve.config import EndpointConfig
    from raytune_llama.train.config import PretrainConfig, SftConfig
    from raytune_llama.tune.config import SweepConfig
    from raytune_llama.vocabulary.config import ExpandVocabConfig

    return {
        "prepare-data": PrepareDataConfig,
        "pretrain": PretrainConfig,
        "sft": SftConfig,
        "sweep": SweepConfig,
        "evaluate": EvaluateConfig,
        "merge": MergeConfig,
        "serve": EndpointConfig,
        "chat": TerminalConfig,
        "generate": GenerateConfig,
        "expand-vocab": ExpandVocabConfig,
        "convert-weights": ConvertConfig,
        "convert-data": ConvertDataConfig,
        "make-data": MakeDataConfig,
    }


class _ResumableInterrupt(KeyboardInterrupt):
    """A job was interrupted that the same command resumes; the message says what is kept."""


@contextlib.contextmanager
def _resumable(kept: str) -> Iterator[None]:
    """Make an interruption of the block one of a job that can be resumed, and say what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        raise _ResumableInterrupt(kept) from None


def _importing() -> contextlib.AbstractContextManager[None]:
    """Log if the imports of the block take long, as those from a cold disk do."""
    logger = logging.getLogger(__name__)
    return waiting(logger, "importing PyTorch and transformers", usually="5 to 20 s")


def _show(text: str) -> None:
    """Write a result to standard output, at once."""
    # A job that ignores SIGHUP outlives its terminal.
    leave_closed_terminal()
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def pretrain(argv: list[str], program: str) -> int:
    """Continue the pre-training of a causal LM on plain text."""
    from raytune_llama.train.config import PretrainConfig

    default = default_config("pretrain_smollm2.yaml")
    return _train(load(PretrainConfig, argv, default=default, program=program))


def sft(argv: list[str], program: str) -> int:
    """Tune a causal LM on conversations."""
    from raytune_llama.train.config import SftConfig

    default = default_config("sft_smollm2.yaml")
    return _train(load(SftConfig, argv, default=default, program=program))


def _train(config: "AnyTrainConfig") -> int:
    """Plan or run a training job."""
    _check_demo(config.model.path)
    from raytune_llama.model.bitsandbytes_import import hide_bitsandbytes_unless

    hide_bitsandbytes_unless(config.model.quantization)
    if config.plan:
        with _importing():
            from raytune_llama.train.estimate.plan import build_plan, render_plan

        _show(render_plan(build_plan(config)))
        return 0
    with _resumable("no step was in progress; checkpoints, and what is encoded so far, are kept"):
        with _importing():
            from raytune_llama.train.trainer import run_training

        run = run_training(config)
    if run.evaluation_line is not None:
        _show(run.evaluation_line)
    _show(f"{run.status} at step {run.step}; run directory: {run.run_dir}")
    if run.result_line is not None:
        _show(run.result_line)
    if run.status == "stopped" and run.step > 0:
        _show(f"to end it there, with a result: the same command with stop_step={run.step + 1}")
    return EXIT_STOPPED if run.status == "stopped" else 0


def sweep(argv: list[str], program: str) -> int:
    """Search for the best settings of a training run, such as learning rate and rank."""
    from raytune_llama.tune.config import SweepConfig

    config = load(SweepConfig, argv, default=default_config("sweep_smollm2.yaml"), program=program)
    if config.plan:
        with _importing():
            from raytune_llama.tune.sweep import plan_sweep

        _show(plan_sweep(config))
        return 0
    with _resumable("no trial was running; those that have ended are kept"):
        from raytune_llama.tune.display import format_trial_line
        from raytune_llama.tune.sweep import run_sweep

        summary = run_sweep(config)
    for trial in summary.trials:
        _show(format_trial_line(config, trial))
    _show(f"{summary.status}; leaderboard.csv and sweep.html: {summary.sweep_dir}")
    for finding in summary.findings:
        _show(str(finding))
    if summary.best_config is not None:
        _show(f"config of the best trial: {summary.best_config}")
    return {"finished": 0, "stopped": EXIT_STOPPED, "failed": 1}[summary.status]


def merge(argv: list[str], program: str) -> int:
    """Merge adapters into a base: a model directory, Meta's .pth or a GGUF file."""
    from raytune_llama.merge.config import MergeConfig

    config = load(MergeConfig, argv, program=program)
    from raytune_llama.model.bitsandbytes_import import hide_bitsandbytes_unless

    hide_bitsandbytes_unless(None)
    with _importing():
        from raytune_llama.merge.merger import merge_adapters
        from raytune_llama.train.monitoring.trackers.descendants import log_merge

    merge_adapters(config)
    log_merge(config)
    _show(f"merged model: {config.target}")
    return 0


def evaluate(argv: list[str], program: str) -> int:
    """Evaluate models side by side: text, questions with known answers, answers to read."""
    from raytune_llama.evaluate.config import EvaluateConfig

    default = default_config("evaluate_smollm2.yaml")
    config = load(EvaluateConfig, argv, default=default, program=program)
    for model in config.models:
        _check_demo(model.path or "", "models.N.path")
    from raytune_llama.model.bitsandbytes_import import hide_bitsandbytes_unless

    hide_bitsandbytes_unless(None)
    with _resumable("what is evaluated so far is kept"):
        with _importing():
            from raytune_llama.evaluate.evaluation import evaluate as evaluate_models
            from raytune_llama.evaluate.table import render_table
            from raytune_llama.train.monitoring.trackers.descendants import log_evaluation

        results = evaluate_models(config)
    log_evaluation(config, results)
    _show(render_table(results, shutil.get_terminal_size((120, 24)).columns))
    _show(f"results.json, samples.jsonl and report.html: {config.run_dir}")
    return 0


def serve(argv: list[str], program: str) -> int:
    """Serve models behind OpenAI's API: `model_dir=DIR`, a config, or a Ray Serve config file."""
    from raytune_llama.serve.config import EndpointConfig, expand_model_dir

    if argv and _is_ray_serve_file(argv[0]):
        from raytune_llama.serve.deploy import deploy_file

        address = deploy_file(Path(argv[0]), argv[1:])
        _show(f"deployed {argv[0]} to {address}; see `serve status`")
        return 0
    config = load(EndpointConfig, expand_model_dir(argv), program=program)
    with _importing():
        from raytune_llama.serve.deploy import serve_until_interrupted

    return serve_until_interrupted(config, announce=_show)


def serve_env(argv: list[str], program: str) -> int:
    """Print the environment variables for `ray start` on a cluster that will serve models."""
    from raytune_llama.serve.config import RequestLimits

    limits = load(RequestLimits, argv, program=program)
    from raytune_llama.serve.deploy import environment_lines

    for line in environment_lines(limits):
        _show(line)
    return 0


def _is_ray_serve_file(argument: str) -> bool:
    """Whether an argument is a config file of Ray Serve, which lists `applications`."""
    path = Path(argument)
    if path.suffix not in {".yaml", ".yml"} or not path.is_file():
        return False
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return any(line.startswith("applications:") for line in lines)


def chat(argv: list[str], program: str) -> int:
    """Chat in the terminal with any OpenAI endpoint; the key is read from OPENAI_API_KEY."""
    from raytune_llama.serve.client.config import TerminalConfig

    config = load(TerminalConfig, argv, program=program)
    from raytune_llama.serve.client.terminal import run_chat

    key = os.environ.get("OPENAI_API_KEY") or None
    try:
        return run_chat(config, key, sys.stdin, sys.stdout, sys.stderr)
    except BrokenPipeError:
        # The reader of the answer has gone, as `head` does; the rest could not be flushed either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def generate(argv: list[str], program: str) -> int:
    """Answer a file of prompts on many workers, or chat with a model without a server."""
    from raytune_llama.generate.config import GenerateConfig

    default = default_config("generate_smollm2.yaml")
    config = load(GenerateConfig, argv, default=default, program=program)
    _check_demo(config.model.path)
    from raytune_llama.model.bitsandbytes_import import hide_bitsandbytes_unless

    hide_bitsandbytes_unless(None)
    if config.interactive:
        with _importing():
            from raytune_llama.generate.interactive import chat_with_model

        return chat_with_model(config, sys.stdin, sys.stdout, sys.stderr)
    with _resumable("finished rows are kept"):
        with _importing():
            from raytune_llama.generate.batch import generate as generate_answers

        summary = generate_answers(config)
    _show(f"{summary.line}; answers: {summary.output}")
    return 0


def prepare_data(argv: list[str], program: str) -> int:
    """Build a token store from text or conversations, also of a training config, or preview it."""
    from raytune_llama.train.data_section import load_preparation

    default = default_config("prepare_data_smollm2.yaml")
    job = load_preparation(argv, default=default, program=program)
    config = job.config
    from raytune_llama.model.bitsandbytes_import import hide_bitsandbytes_unless
    from raytune_llama.storage.directories import fetch_directory, pin_directory

    hide_bitsandbytes_unless(None)
    field = job.tokenizer_field
    tokenizer = fetch_directory(pin_directory(config.tokenizer, field), field, weights=False)
    if config.preview:
        with _importing():
            from raytune_llama.data.build.preparation import pin_sources
            from raytune_llama.data.build.preview import render_preview

            data = pin_sources(job.resolve_data())
        number = config.preview_documents
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        _show(render_preview(data, tokenizer, num_documents=number, color=color))
        return 0
    with _resumable("what is encoded so far is kept"), contextlib.ExitStack() as stack:
        with _importing():
            from raytune_llama.connection import connect_to_ray
            from raytune_llama.data.build import preparation

            data = preparation.pin_sources(job.resolve_data())
        inputs = preparation.open_data(data, tokenizer)
        store = preparation.prepare_data(
            data, inputs, start_ray=lambda: stack.enter_context(connect_to_ray())
        )
    _show(f"token store: {store.place}")
    return 0


def expand_vocab(argv: list[str], program: str) -> int:
    """Grow a tokenizer by tokens learned from text, and its model by rows for them."""
    from raytune_llama.vocabulary.config import ExpandVocabConfig

    default = default_config("expand_vocab_smollm2.yaml")
    config = load(ExpandVocabConfig, argv, default=default, program=program)
    with _importing():
        from raytune_llama.vocabulary.expansion import expand_vocabulary

    _show(expand_vocabulary(config))
    _show(f"expanded model: {config.target}")
    return 0


def convert_weights(argv: list[str], program: str) -> int:
    """Convert LLaMA weights between Meta's .pth files and a Hugging Face model directory."""
    from raytune_llama.model.meta.config import ConvertConfig

    config = load(ConvertConfig, argv, program=program)
    from raytune_llama.model.meta.conversion import convert_weights as convert

    convert(config)
    _show(f"{config.to} weights: {Path(config.target)}")
    return 0


def convert_data(argv: list[str], program: str) -> int:
    """Convert conversations from one JSON format to another."""
    from raytune_llama.data.config import ConvertDataConfig

    config = load(ConvertDataConfig, argv, program=program)
    from raytune_llama.data.conversion import convert_data as convert

    convert(config)
    _show(f"converted: {config.target}")
    return 0


def make_data(argv: list[str], program: str) -> int:
    """Make instruction data for `sft` with any OpenAI endpoint; the key is in OPENAI_API_KEY."""
    from raytune_llama.generate.make_data.config import MakeDataConfig, check_packages

    config = load(MakeDataConfig, argv, default=default_config("make_data.yaml"), program=program)
    check_packages()
    with _resumable("no reply was being recorded; the rows so far are kept"):
        from raytune_llama.generate.make_data import job
        from raytune_llama.generate.make_data.counts import format_table

        variable = config.api_key_variable
        key = (os.environ.get(variable) or None) if variable is not None else None
        summary = job.make_data(config, key)
    for line in format_table(summary.counts):
        _show(line)
    _show(f"{summary.status} ({summary.ended_by}); rows: {summary.data_file}")
    return EXIT_STOPPED if summary.status == "stopped" else 0


def make_key(argv: list[str], program: str) -> int:
    """Make an API key for the endpoint, print it once and append its hash to FILE."""
    import argparse

    parser = argparse.ArgumentParser(prog=program, description=make_key.__doc__)
    parser.add_argument("file", type=Path, help="hashes of the accepted keys (`keys_file`)")
    parser.add_argument("name", nargs="?", default="", help="owner of the key, a comment in FILE")
    given = parser.parse_args(argv)
    from raytune_llama.serve.http.keys import append_hash
    from raytune_llama.serve.http.keys import make_key as generate_key

    key, line = generate_key()
    append_hash(given.file, line, given.name)
    _show(f"{key}\nonly its hash is stored, in {given.file}: keep the key")
    return 0


def runs(argv: list[str], program: str) -> int:
    """List, show and compare run directories, and delete what they do not need."""
    from raytune_llama.runs.command import run_command

    _show(run_command(argv, program, shutil.get_terminal_size((120, 24)).columns))
    return 0


def demo(argv: list[str], program: str) -> int:
    """Make a real model and real text from two pip packages, without a network: [TARGET=demo]."""
    if len(argv) > 1 or any(argument.startswith("-") for argument in argv):
        _show(f"usage: {program} [TARGET=demo]\n\n{demo.__doc__}")
        return 0 if {"-h", "--help"} & set(argv) else EXIT_MISTAKE
    from raytune_llama.demo import make_demo

    for line in make_demo(Path(argv[0] if argv else "demo")):
        _show(line)
    return 0


def _check_demo(model: str, field: str = "model.path") -> None:
    if model == "demo/model" and not Path(model).is_dir():
        raise ConfigError([f"{field}: there is no demo/model here; make it with: raytune demo"])


VERBS: Final[dict[str, Callable[[list[str], str], int]]] = {
    "demo": demo,
    "prepare-data": prepare_data,
    "pretrain": pretrain,
    "sft": sft,
    "sweep": sweep,
    "evaluate": evaluate,
    "merge": merge,
    "runs": runs,
    "serve": serve,
    "serve-env": serve_env,
    "chat": chat,
    "generate": generate,
    "expand-vocab": expand_vocab,
    "convert-weights": convert_weights,
    "convert-data": convert_data,
    "make-data": make_data,
    "make-key": make_key,
}
"""What `raytune` can do, in the order of its help: takes arguments and its own name, and returns
the exit status."""


def _usage() -> str:
    lines = [
        "usage: raytune VERB [CONFIG.yaml] [a.b=c ...]",
        "",
        *(f"  {verb:<16} {(act.__doc__ or '').splitlines()[0]}" for verb, act in VERBS.items()),
        "",
        "raytune VERB --help lists every field of a verb's config, --help SECTION one section.",
    ]
    return "\n".join(lines)
