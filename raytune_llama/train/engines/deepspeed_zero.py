"""Training engine for DeepSpeed ZeRO 1 to 3; the only module that imports deepspeed."""

import fcntl
import logging
import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from raytune_llama.config.errors import UserError
from raytune_llama.data.batches.step_batches import MicroBatch
from raytune_llama.logs import waiting
from raytune_llama.model.llama import DTYPES, SummedLoss
from raytune_llama.train.engines.config import EngineConfig, OptimConfig
from raytune_llama.train.engines.optimizer import (
    build_optimizer,
    parameter_groups,
    set_learning_rate,
)
from raytune_llama.train.engines.protocol import (
    STATE_KEYS,
    ReadState,
    StateSlice,
    StepResult,
    evaluate_batch,
    keep_buffer_precision,
    module_tensors,
    nonfinite_indices,
    to_device,
    trained_parameters,
)
from raytune_llama.train.process_group import ProcessGroup, ensure_process_group

logger = logging.getLogger(__name__)


def deepspeed_config(
    engine: EngineConfig, optim: OptimConfig, *, micro_batch_sequences: int, num_micro_batches: int
) -> dict[str, Any]:
    """Return DeepSpeed's JSON config: that of our fields, and the user's additional keys.

    Raises:
        UserError: an additional key contradicts one of our fields.
    """
    zero: dict[str, Any] = {"stage": engine.resolved_zero_stage, "compute_grad_norm": True}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_sequences,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": optim.max_grad_norm or 0.0,
        # Without this check, non-finite gradients would be applied.
        "bf16": {"enabled": engine.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": engine.precision == "fp16"},
        "zero_optimization": zero,
        # The optimizer is PyTorch's own, on both CPU and GPU.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Half-precision sums of gradients lose accuracy with every worker and micro-batch.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        # Disables its progress line; our own has more.
        "steps_per_print": 2**31,
    }
    if engine.resolved_zero_stage == 1 and engine.precision == "bf16":
        # With data_types, DeepSpeed uses BF16_Optimizer, which ignores the rest of this JSON.
        del ours["data_types"]
    return _merged(ours, engine.deepspeed, "engine.deepspeed")


def _merged(ours: dict[str, Any], extra: dict[str, Any], path: str) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            merged[key] = _merged(ours[key], value, f"{path}.{key}")
        elif key in ours and ours[key] != value:
            raise UserError(
                f"{path}.{key}: {value!r} contradicts {ours[key]!r}, which follows from the "
                "run's settings; remove this key and change the settings instead"
            )
        else:
            merged[key] = value
    return merged


_TORCH_LIBRARIES = str(Path(torch.__file__).parent / "lib")


class DeepSpeedEngine:
    """DeepSpeed ZeRO: optimizer state, gradients and weights partitioned over the workers."""

    def __init__(
        self,
        module: SummedLoss,
        engine: EngineConfig,
        optim: OptimConfig,
        workers: ProcessGroup,
        *,
        micro_batch_sequences: int,
        num_micro_batches: int,
    ) -> None:
        what = "loading DeepSpeed, which compiles its collective when a machine uses it first"
        with waiting(logger, what, usually="5 s, the first time 20 to 60 s"):
            deepspeed = _import_deepspeed(workers.device)
        self._deepspeed = deepspeed
        self._config = engine
        self._workers = workers
        # Taken before ZeRO 3 replaces each parameter's data with an empty 1-D tensor.
        named = trained_parameters(module)
        self._named = named
        self._shapes = {name: parameter.shape for name, parameter in named}
        self._nan_if_nonfinite = torch.ones((), device=workers.device)
        smallest = min((parameter for _, parameter in named), key=torch.numel)
        smallest.register_hook(self._propagate_nonfinite_loss)
        json = deepspeed_config(
            engine,
            optim,
            micro_batch_sequences=micro_batch_sequences,
            num_micro_batches=num_micro_batches,
        )
        with keep_buffer_precision(module, workers.device):
            module.to(DTYPES[engine.precision])
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=build_optimizer(parameter_groups(module.model, named, optim), optim),
                config=json,
                dist_init_required=False,
            )
        self.module = module
        self._num_applied = 0
        self._has_moments = False

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        seeds: Sequence[int],
        num_targets: float,
        learning_rate: float,
    ) -> StepResult:
        """Take one optimizer step; see `TrainEngine`."""
        scale = self._loss_scale
        losses: list[Tensor] = []
        total = torch.zeros((), device=self._workers.device)
        set_learning_rate(self._engine.optimizer.param_groups, learning_rate)
        for batch, seed in zip(micro_batches, seeds, strict=True):
            torch.manual_seed(seed)
            loss = self._engine(*to_device(batch, self._workers.device))
            losses.append(loss.detach())
            if len(losses) == len(micro_batches):
                # Before the last gradients exist: after them, DeepSpeed decides on its own.
                total = self._workers.all_reduce_in_place(sum(losses, total).double())
                self._nan_if_nonfinite = torch.where(total.isfinite(), 1.0, math.nan)
            # DeepSpeed averages gradients over the workers; our loss is a sum over the full step.
            self._engine.backward(
                loss * (self._workers.world_size / num_targets), scale_wrt_gas=False
            )
            self._engine.step()
        self._nan_if_nonfinite = torch.ones_like(self._nan_if_nonfinite)
        was_applied = self._engine.was_step_applied()
        self._num_applied += was_applied
        if was_applied and not self._has_moments:
            self._link_moments()
            self._has_moments = True
        norm = float(self._engine.get_global_grad_norm() or 0.0) if was_applied else float("inf")
        bad = () if was_applied else nonfinite_indices(losses)
        return StepResult(total.item(), norm, was_applied, scale, bad)

    def _propagate_nonfinite_loss(self, gradient: Tensor) -> Tensor:
        """Make one parameter's gradient NaN if the loss is not finite, so that the step is skipped.

        A non-finite loss can have finite gradients. Multiplying the loss by NaN is not enough: new
        rows that a micro-batch does not look up have a zero gradient whatever the loss is.
        """
        return gradient * self._nan_if_nonfinite

    def _link_moments(self) -> None:
        """Link every parameter to its moments in DeepSpeed's optimizer (stages 1 and 2).

        DeepSpeed does so only once, after the first group's step, when other groups have none.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self._config.resolved_zero_stage == 3:
            return
        zero = self._engine.optimizer
        groups = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
        for parameters, partition in groups:
            lazy_init_hp_params_optimizer_state(parameters, partition, zero.optimizer.state)

    def loss_sum(self, batch: MicroBatch) -> float:
        """Return the summed loss of a batch; see `TrainEngine`."""
        return evaluate_batch(self._engine, self._engine, batch, self._workers.device).item()

    def row_losses(self, batch: MicroBatch) -> list[float]:
        """Return the summed loss of each row of a batch; see `TrainEngine`."""
        device = self._workers.device
        return evaluate_batch(self._engine, self._engine, batch, device, by_row=True).tolist()

    def trainable_state(self) -> Iterator[StateSlice]:
        """Yield this worker's slices, as ZeRO partitions them; see `TrainEngine`."""
        for name, parameter in self._named:
            start, stop = self._held_range(parameter)
            if start == stop:
                continue
            weight = self._held(parameter, None)[: stop - start]
            moments = [
                self._held(parameter, part)[: stop - start]
                if self._has_moments
                else torch.zeros_like(weight)
                for part in ("exp_avg", "exp_avg_sq")
            ]
            yield StateSlice(name, start, weight.detach(), *moments)

    def _held_range(self, parameter: Any) -> tuple[int, int]:  # noqa: ANN401  # DeepSpeed's attributes
        """Return the element range of a parameter whose float32 master this worker holds."""
        if self._config.resolved_zero_stage == 3:
            # Equal partitions, of which the last are padded, or only padding.
            size = parameter.ds_tensor.ds_numel
            first = size * self._workers.rank
            return min(first, parameter.ds_numel), min(first + size, parameter.ds_numel)
        # A group is partitioned as one flat tensor: a worker may hold nothing of a parameter.
        mapping = parameter._hp_mapping  # DeepSpeed's full-tensor getters use it too
        if mapping is None:
            return 0, 0
        address = mapping.lp_fragment_address
        return address.start, address.start + address.numel

    def _held(self, parameter: Any, moment: str | None) -> Tensor:  # noqa: ANN401  # as above
        """Return this worker's part of the master or a moment; padded at its end under ZeRO 3."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        if self._config.resolved_zero_stage < 3:
            return parameter._hp_mapping.get_hp_fragment(moment)
        if moment is None:
            return cast("Tensor", safe_get_local_fp32_param(parameter))
        return cast("Tensor", safe_get_local_optimizer_state(parameter, moment))

    @torch.no_grad()
    def load_trainable_state(self, read: ReadState) -> None:
        """Set the state of every trained parameter; see `TrainEngine`."""
        self._make_moments()
        if self._config.resolved_zero_stage == 3:
            self._load_zero3_shards(read)
            return
        for name, parameter in self._named:
            # The forward pass reads full weights, which every worker has apart from the masters.
            parameter.copy_(read("weight", name, 0, parameter.numel()).view_as(parameter))
            start, stop = self._held_range(parameter)
            for part in STATE_KEYS if start < stop else ():
                held = self._held(parameter, None if part == "weight" else part)
                held.copy_(read(part, name, start, stop))

    def _load_zero3_shards(self, read: ReadState) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        # Small parameters stay full on every worker, and are gathered again at the end.
        self._engine.optimizer.checkpoint_event_prologue()
        for name, untyped in self._named:
            parameter: Any = untyped  # with DeepSpeed's attributes
            start, stop = self._held_range(parameter)
            padding = (0, parameter.ds_tensor.ds_numel - (stop - start))
            shards = {
                part: nn.functional.pad(read(part, name, start, stop), padding).to(
                    self._workers.device
                )
                for part in STATE_KEYS
            }
            weight = shards.pop("weight")
            parameter.ds_tensor.copy_(weight)
            safe_set_local_fp32_param(parameter, weight)
            for part, moment in shards.items():
                safe_set_local_optimizer_state(parameter, moment, part)
        self._engine.optimizer.checkpoint_event_epilogue()

    def _make_moments(self) -> None:
        """Take a step without targets at learning rate 0, since only a step creates the moments."""
        with torch.enable_grad():
            ids = torch.zeros((1, 2), dtype=torch.long)
            nothing = MicroBatch(ids, torch.full_like(ids, -100), torch.arange(2).unsqueeze(0))
            count = self._engine.gradient_accumulation_steps()
            self.train_step([nothing] * count, [0] * count, 1.0, 0.0)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every full trained parameter; see `TrainEngine`."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self._named:
            full = cast("Tensor", safe_get_full_fp32_param(parameter)).detach()
            yield name, full.reshape(self._shapes[name]).cpu()

    @property
    def _loss_scale(self) -> float:
        return float(self._engine.optimizer.loss_scale) if self._config.precision == "fp16" else 1.0

    def replicated_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all parameters and buffers; nothing under ZeRO 3; see `TrainEngine`."""
        return module_tensors(self.module) if self._config.resolved_zero_stage < 3 else iter(())

    def scalar_state(self) -> dict[str, float]:
        """Return the applied steps and the loss scaler's state; see `TrainEngine`."""
        state: dict[str, float] = {"num_applied": self._num_applied}
        if self._config.precision == "fp16":
            scaler = self._engine.optimizer.loss_scaler
            state |= {
                "loss_scale": scaler.cur_scale,
                "num_good": scaler.cur_iter - scaler.last_overflow_iter - 1,
                "hysteresis": scaler.cur_hysteresis,
            }
        return state

    def load_scalar_state(self, state: dict[str, float]) -> None:
        """Restore what `scalar_state` returned; see `TrainEngine`."""
        self._num_applied = int(state["num_applied"])
        for moments in self._engine.optimizer.optimizer.state.values():
            moments["step"].fill_(self._num_applied)
        if self._config.precision == "fp16":
            scaler = self._engine.optimizer.loss_scaler
            scaler.cur_scale = state["loss_scale"]
            scaler.last_overflow_iter = -1
            scaler.cur_iter = int(state["num_good"])
            scaler.cur_hysteresis = int(state.get("hysteresis") or scaler.cur_hysteresis)


def _import_deepspeed(device: torch.device) -> Any:  # noqa: ANN401  # the module is untyped
    """Import DeepSpeed for a device; create a process group of this process if none exists."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    # Its ops are compiled by ninja, which pip installs next to the interpreter.
    tools = str(Path(sys.executable).parent)
    if tools not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([tools, os.environ.get("PATH", "")])
    import deepspeed
    from torch.utils import cpp_extension

    # PyTorch 2.13 quotes its header paths, but not its library path (`-L`).
    cpp_extension.TORCH_LIB_PATH = shlex.quote(_TORCH_LIBRARIES)
    cpp_extension.FileBaton = CompileLock  # pyright: ignore[reportPrivateImportUsage]  # replaced
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    ensure_process_group(device)
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


class CompileLock:
    """Lock by which one process of a machine compiles an op while the others wait.

    It replaces PyTorch's `FileBaton`, whose lock is a file that a killed process leaves on the
    disk: every later process would wait for it forever. The kernel releases this one.
    """

    def __init__(self, lock_file_path: str) -> None:
        self._path = f"{lock_file_path}.flock"
        self._descriptor = -1

    def try_acquire(self) -> bool:
        """Acquire the lock, unless another process holds it; return whether it is ours now."""
        self._descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            return False
        return True

    def wait(self) -> None:
        """Wait until no process holds the lock."""
        descriptor = os.open(self._path, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)

    def release(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)
