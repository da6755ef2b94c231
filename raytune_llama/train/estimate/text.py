"""A plan as text: `print(render_plan(build_plan(config)))`."""

from collections.abc import Iterator

from raytune_llama.train.estimate.plan import DiskPlan, RunPlan, StepPlan, WorkersPlan

_GIB = 2**30
_NOTES = (
    "* as configured. Not all parts are there at a time, so the peak is less than their sum.",
    "Not counted: Python and its libraries, and what an allocator or a driver keeps besides.",
)


def render_plan(plan: RunPlan) -> str:
    """Return a plan as text for a terminal, at most 100 columns wide."""
    lines = [f"{name:<13}{text}" for name, text in _facts(plan)]
    tables = [line for workers in plan.workers for line in ("", *_memory_table(plan, workers))]
    return "\n".join([*lines, *tables, *_NOTES])


def _facts(plan: RunPlan) -> Iterator[tuple[str, str]]:
    config, counts, steps, disk = plan.config, plan.counts, plan.steps, plan.disk
    weights = "" if plan.has_weights else ", no weights there yet"
    yield "model", f"{config.model.path}{weights}"
    fit = plan.vocabulary
    rows = max(fit.num_rows, fit.num_ids)
    yield "vocabulary", f"{fit.num_ids:,} ids, {rows:,} rows, {rows - fit.num_rows:,} of them new"
    yield "parameters", f"{counts.unique:,}"
    yield "  trained", f"{counts.trained:,} ({counts.trained / counts.unique:.4%})"
    if counts.resident != counts.unique:
        originals = counts.resident - counts.unique
        yield "  in memory", f"{counts.resident:,}, with {originals:,} of saved modules' originals"
    batch = config.batch
    yield "steps", f"{_steps_text(steps)} of {batch.sequences_per_step:,} sequences"
    if steps.num_steps is not None:
        total = f", {steps.num_steps * steps.step_tokens:,} in all"
    else:
        total = ""
    yield "tokens", f"{steps.step_tokens:,} a step, {batch.sequence_tokens:,} a sequence{total}"
    for workers in plan.workers:
        yield (
            "workers",
            f"{workers.num_workers}, each {workers.num_micro_batches} x "
            f"{batch.micro_batch_sequences} sequences a step, {workers.filler_sequences} filler "
            "in all",
        )
    if steps.epochs is None:
        yield "epochs", "unknown until the token store is built"
    for name, epochs in (steps.epochs or {}).items():
        yield "epochs", f"{epochs:.4g} of {name}"
    yield (
        "checkpoints",
        f"{_gib(disk.checkpoint)} GiB each, {disk.num_checkpoints} kept and one while it is "
        f"written: {_gib((disk.num_checkpoints + 1) * disk.checkpoint)} GiB",
    )
    if config.checkpoint.background:
        yield (
            "  copied",
            f"{_gib(disk.checkpoint)} GiB of the nodes' memory together, to be written",
        )
    yield "result", f"{config.result_name}, {_gib(disk.result)} GiB"
    yield "token store", _store_text(disk)


def _steps_text(steps: StepPlan) -> str:
    return "unknown number" if steps.num_steps is None else f"{steps.num_steps:,}"


def _store_text(disk: DiskPlan) -> str:
    if disk.store is None:
        return "unknown: compressed and Parquet files, and conversations, do not show it"
    if disk.store_exists:
        return f"{_gib(disk.store)} GiB, there"
    return f"about {_gib(disk.store)} GiB, by a sample of the sources"


def _memory_table(plan: RunPlan, workers: WorkersPlan) -> Iterator[str]:
    engine, scale = plan.config.engine, plan.config.scale
    layouts = [memory.layout for memory in workers.memory]
    heads = [f"{layout}{'*' if layout == engine.layout else ''}" for layout in layouts]
    where = "a GPU" if scale.use_gpu else "a CPU"
    kind = plan.config.model.quantization
    base = f", {kind} base" if kind else ""
    who = f"1 of {workers.num_workers} workers" if scale.elastic_range else "a worker"
    title = f"GiB of {who} on {where}, {engine.precision}{base}"
    yield _row(title, heads)
    parts = {
        "weights": "weights",
        "weights whole while used": "gathered",
        "optimizer state": "optimizer",
        "gradients": "gradients",
        "buffers for gradients": "buffers",
        "activations": "activations",
        "loss, logits in chunks": "loss",
        "in the host's memory instead": "offloaded",
    }
    for label, field in parts.items():
        numbers = [getattr(memory, field) for memory in workers.memory]
        if any(numbers):
            yield _row(label, [_gib(number) for number in numbers])
    yield _row("peak", [_gib(memory.peak) for memory in workers.memory])
    toggled = "without" if engine.gradient_checkpointing else "with"
    yield f"{toggled} gradient checkpointing"
    for label in ("activations", "peak"):
        numbers = [getattr(memory, label) for memory in workers.memory_toggled]
        yield _row(f"  {label}", [_gib(number) for number in numbers])


def _row(label: str, cells: list[str]) -> str:
    return f"{label:<36}" + "".join(f"{cell:>10}" for cell in cells)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:,.3f}"
