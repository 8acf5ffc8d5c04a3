"""The one training loop. It knows turns, roles and losses, and no method."""

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from . import attention, parallel, sharding
from .adapters import remove_adapters
from .batches import GlobalBatchSampler, MicroBatch, batches
from .build import attention_switches, build_networks, teacher_denoiser
from .cached import check_cache, encoders
from .checkpointing import RunCheckpoints
from .config import to_mapping
from .data import fingerprint
from .diagnostics import Watch
from .divergence import all_finite, non_finite
from .ema import EMA
from .errors import InputError, reject
from .families import Cond, family_of
from .images import save_grid
from .methods import Batch, Method
from .offload import Offload
from .optim import build_optimizer, learning_rate_factor
from .provenance import provenance
from .random import SampleRandom, derive_seed
from .redaction import redacted
from .run_record import RunRecord, claim
from .run_state import RunState
from .sampler import ode_sample, uniform_timesteps
from .shards import weights_digest
from .stops import Signals, Stopped
from .train_config import FP16_REFUSED, TrainConfig

VALIDATION, TURN = 1, 2  # first keys of the random streams


class Trainer:
    """Trains the student of `method` from the pipeline `pipe`.

    Args:
        pipe: a diffusers pipeline; its denoising network becomes the frozen teacher.
        method: what to train, and how.
        config: settings of the loop.
        dataset: items {"condition": prompt or class label, "image": (C, H, W) in [-1, 1] if `method.needs_images`}.
        resolution: pixels of the student's samples. None: the pipeline's own.
        settings: what else belongs into run.json (teacher, data).
    """

    def __init__(
        self,
        pipe: Any,
        method: Method,
        config: TrainConfig,
        dataset: Dataset[Any],
        resolution: int | None = None,
        settings: dict[str, Any] | None = None,
    ):
        self.method, self.config, self.dataset, self.pipe = method, config, dataset, pipe
        self.output_dir = Path(config.output_dir)
        self.accelerator = _accelerator(config)
        config.mixed_precision = config.mixed_precision or self.accelerator.mixed_precision
        if config.mixed_precision == "fp16":
            raise InputError(FP16_REFUSED)
        if config.parallelism == "shard" and parallel.world_size() == 1:
            raise reject("parallelism", "shard", "'replicate' for one process: there is none to share the weights with")
        self.device = self.accelerator.device
        self.family = family_of(pipe)
        check_cache(dataset, pipe, self.family, resolution)
        pipe.to(self.device)
        teacher = teacher_denoiser(pipe)
        self.samplers = method.samplers(teacher.schedule)
        self.sampler = self.samplers[0]
        for sampler in self.samplers:
            sampler.validate(teacher.schedule, teacher.prediction_type)
        self.resolution, self.sample_shape = resolution, self.family.sample_shape(pipe, resolution)
        self.uncond = self.family.unconditional(pipe, 1, resolution)
        self.settings, self.fingerprint = redacted(to_mapping(method, config) | (settings or {})), fingerprint(dataset)
        self.teacher_digest = _digest_of(teacher.model, config)
        begun = claim(self.output_dir, config.resume_from_checkpoint)
        self.record = RunRecord(self.output_dir, self.accelerator, config)
        self.nets = build_networks(pipe, method, config, resolution, self.uncond)
        turns = (roles for step in range(config.max_train_steps) for roles, _ in method.updates(step))
        if idle := set(method.student_roles).difference(*turns):
            raise reject("max_train_steps", config.max_train_steps, f"{', '.join(sorted(idle))} would never train")
        self.optimizers = {
            role: build_optimizer(self.nets.parameters(role).values(), self._base_rate(role), config) for role in self.trained
        }
        self.lr_factor = learning_rate_factor(config)
        averaged = method.student_roles if config.ema_decay else ()
        self.emas = {role: EMA(self.nets.parameters(role), config.ema_decay) for role in averaged}
        self.checkpoints = self._checkpoints()
        self.step = 0
        if path := self.checkpoints.to_continue(begun):
            self.load(path)
        self.offload = Offload(encoders(pipe, self.family).values(), self.nets, self.optimizers, self.device, config)
        self.attention: list[attention.Switch] = []
        if config.attention_backend:  # tried on two prompts: a longer one may come with a mask
            self.attention = attention_switches(self.nets, config, self.sample_shape, *self._conditions(self.validation_conditions()[:1]))

    @property
    def trained(self) -> tuple[str, ...]:
        return self.nets.trained_roles

    @property
    def global_batch_size(self) -> int:
        return self.config.train_batch_size * self.config.gradient_accumulation_steps * parallel.world_size()

    @property
    def _sharded(self) -> bool:
        return self.config.parallelism == "shard"

    @property
    def watch(self) -> Watch:
        return self.record.watch

    def train(self) -> None:
        """Run to `max_train_steps`, then write the last checkpoint and sample grid."""
        data = self._data()
        ready = [self._prepare(raw) for raw in itertools.islice(data, 1)]  # data that cannot be used stops the run before it begins
        self._conditions(self.validation_conditions())
        parallel.meet(self.config.rank_timeout)  # a slower process must not find run.json and take it for another run's
        self.record.start(self._description(), self.step)
        with (
            self.offload.brought_back_after_errors(),
            attention.in_use(self.attention),
            self.checkpoints.finished(),
            Signals().caught() as signals,
        ):
            self._loop(itertools.chain(ready, map(self._prepare, data)), signals)
        self.record.finish()

    def _loop(self, steps: Iterator[list[Batch]], signals: Signals) -> None:
        config = self.config
        logs: dict[str, Tensor] = {}
        started, first = time.perf_counter(), self.step
        hidden = not self.accelerator.is_local_main_process
        with tqdm(total=config.max_train_steps, initial=self.step, desc="train", disable=hidden) as progress:
            for micro_batches in steps:
                logs |= self.train_step(micro_batches)
                progress.update()
                if self.step % config.logging_steps == 0 or self.step == config.max_train_steps:
                    rate = (self.step - first) / (time.perf_counter() - started)
                    progress.set_postfix(self._log(logs, rate))
                    logs = {}
                if self._due(config.validation_steps):
                    self.save_samples()
                parallel.meet(config.rank_timeout)
                end, asked, failed = signals.agreed(self.device, self.checkpoints.failed)
                if end or failed or self.step == config.max_train_steps:
                    self.save()
                elif asked or self._due(config.checkpointing_steps):
                    self.checkpoints.start_save(self.step)
                if end and self.step < config.max_train_steps:
                    stopped = Stopped(end, self.step)
                    if self.accelerator.is_main_process:
                        progress.write(str(stopped), file=sys.stderr)
                    raise stopped

    def train_step(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """One optimizer step on the micro-batches of this rank: every turn of the method in order."""
        logs: dict[str, Tensor] = {}
        for turn, (roles, loss_fn) in enumerate(self.method.updates(self.step)):
            losses = []
            self.offload.begin(roles)
            with self.nets.only_trains(roles):
                for batch in micro_batches:
                    batch.random = SampleRandom((self.config.seed, TURN, self.step, turn), batch.random.slots, self.device)
                    torch.manual_seed(derive_seed(self.config.seed, TURN, self.step, turn, batch.random.slots[0]))  # dropout
                    loss, extra = loss_fn(self.nets, batch)
                    (loss / len(micro_batches)).backward()
                    losses.append(loss.detach())
                    for name, value in {"loss": loss.detach(), **extra}.items():
                        key = f"{roles[0]}/{name}"
                        logs[key] = logs.get(key, 0) + value.detach() / len(micro_batches)
            parallel.meet(self.config.rank_timeout)
            norms = {role: self._clip(role) for role in roles}
            if not all_finite(losses, norms):
                raise non_finite(self.output_dir, self.step, roles, norms, logs, micro_batches)
            for role in roles:
                self._optimize(role)
            logs |= {f"{role}/grad_norm": norm for role, norm in norms.items()}
            for role in roles:
                if role in self.emas:
                    self.emas[role].update()
            if "student" in roles:
                self._update_followers()
        for role in self.method.finished(self.step):
            if role in self.emas:
                self.emas[role].settle()
        self.step += 1
        return logs

    def _clip(self, role: str) -> Tensor:
        """Gradient norm of `role` over all ranks, before it is scaled down to `max_grad_norm`."""
        return sharding.clip_gradients(self.nets.parameters(role).values(), self.config.max_grad_norm)

    def _optimize(self, role: str) -> None:
        optimizer = self.optimizers[role]
        optimizer.param_groups[0]["lr"] = self._base_rate(role) * self.lr_factor(self.step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _update_followers(self) -> None:
        student: list[Tensor] = list(self.nets.parameters("student").values())
        for role, decay in self.method.followers.items():
            self.offload.call(role)
            torch._foreach_lerp_(list(self.checkpoints.state.follower(role).values()), student, 1 - decay)

    def _base_rate(self, role: str) -> float:
        return self.method.learning_rate(role) or self.config.learning_rate

    def _data(self) -> Iterator[list[MicroBatch]]:
        sampler = GlobalBatchSampler(len(self.dataset), self.global_batch_size, self.config.seed)  # type: ignore[arg-type]
        return batches(
            self.dataset,
            sampler,
            rank=parallel.rank(),
            world_size=parallel.world_size(),
            accumulation=self.config.gradient_accumulation_steps,
            start_step=self.step,
            stop_step=self.config.max_train_steps,
            num_workers=self.settings.get("dataloader_num_workers", 0),
        )

    def _prepare(self, raw: list[MicroBatch]) -> list[Batch]:
        return [self._batch(micro_batch) for micro_batch in raw]

    @torch.no_grad()
    def _batch(self, raw: MicroBatch) -> Batch:
        image = raw["image"]
        cond, uncond = self._conditions(raw["condition"], raw["cond"])
        x0, noise = (None if value is None else value.to(self.device) for value in (raw["x0"], raw["noise"]))
        if image is not None:
            with self.offload.encoders.needed():
                x0 = self.family.encode_images(self.pipe, image.to(self.device))
        if x0 is not None and tuple(x0.shape[1:]) != self.sample_shape:
            raise reject("resolution", tuple(x0.shape[1:]), f"the student samples {self.sample_shape}; set the same resolution for both")
        return Batch(cond, uncond, self.sample_shape, SampleRandom((), raw["slots"], self.device), x0, noise)

    def _conditions(self, conditions: Sequence[Any], stored: Cond | None = None) -> tuple[Cond, Cond]:
        uncond = {name: value.expand(len(conditions), *value.shape[1:]) for name, value in self.uncond.items()}
        if stored is not None:
            return {name: value.to(self.device) for name, value in stored.items()}, uncond
        with self.offload.encoders.needed():
            return self.family.encode_conditions(self.pipe, conditions, self.resolution), uncond

    def _due(self, interval: int) -> bool:
        return self.step == self.config.max_train_steps or (interval > 0 and self.step % interval == 0)

    def release(self) -> None:
        """Free what only training needs, so that the student can be loaded a second time beside this one.

        Networks spread over ranks become whole on rank 0, the student at its moving average; the others hold none from then on.
        """
        self.optimizers.clear()
        self.offload.bring_back()
        self.nets.keep((*self.method.student_roles, "student", "teacher"))
        if self._sharded:
            for ema in self.emas.values():
                ema.settle()
            self.emas.clear()
            sharding.gather([getattr(self.nets, role) for role in self.nets], self.device)
            setattr(self.pipe, self.family.component, self.nets.teacher.model)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------ samples

    @torch.no_grad()
    def sample(self, conditions: Sequence[Any], seed: int = 0) -> Tensor:
        """The student's images (B, C, H, W) in [-1, 1] at its moving average; fixed noise for a fixed `seed`."""
        random = self._validation_random(len(conditions), seed)
        noise = random.normal((len(conditions), *self.sample_shape))
        with self.student_weights():
            x0 = self.sampler.sample(self.nets.student, noise, self._conditions(conditions)[0], random.normal_like)
        with self.offload.encoders.needed():
            return self.family.decode(self.pipe, x0)

    @torch.no_grad()
    def teacher_sample(self, conditions: Sequence[Any], seed: int = 0, steps: int = 50) -> Tensor:
        """The unguided teacher's images at the same noise."""
        noise = self._validation_random(len(conditions), seed).normal((len(conditions), *self.sample_shape))
        teacher = self.nets.teacher
        x0 = ode_sample(teacher, noise, self._conditions(conditions)[0], uniform_timesteps(teacher.schedule, steps))
        with self.offload.encoders.needed():
            return self.family.decode(self.pipe, x0)

    def student_weights(self) -> Any:
        """Context in which the student holds what is exported: its moving average, if there is one."""
        stack = ExitStack()
        for ema in self.emas.values():
            stack.enter_context(ema.applied())
        return stack

    def validation_conditions(self) -> list[Any]:
        """`num_validation_images` conditions for sample grids."""
        given: Sequence[Any] = self.config.validation_prompts
        if not given:
            count = min(len(self.dataset), self.config.num_validation_images)  # type: ignore[arg-type]
            given = [self.dataset[i]["condition"] for i in range(count)]
        return [given[i % len(given)] for i in range(self.config.num_validation_images)]

    def save_samples(self) -> None:
        """Write samples/step_N.png (and samples/teacher.png, once) from the main process."""
        folder = self.output_dir / "samples"
        writes = self.accelerator.is_main_process
        drawn = (folder / "teacher.png").exists()
        if self._sharded:  # every rank takes part in every pass
            drawn = any(parallel.maximum((int(writes and drawn),), self.device))
        elif not writes:
            return
        conditions = self.validation_conditions()
        grids = {} if drawn else {"teacher": self.teacher_sample(conditions)}
        grids[f"step_{self.step:06d}"] = self.sample(conditions)
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            for name, images in grids.items():
                save_grid(images, folder / f"{name}.png", self._columns)

    @property
    def _columns(self) -> int | None:
        """A column for each prompt where several rows of them fit."""
        prompts = len(self.config.validation_prompts)
        return prompts if 1 < prompts < self.config.num_validation_images else None

    def _validation_random(self, count: int, seed: int) -> SampleRandom:
        return SampleRandom((self.config.seed, VALIDATION, seed), range(count), self.device)

    # ------------------------------------------------------------------ logs

    def _log(self, logs: dict[str, Tensor], rate: float) -> dict[str, str]:
        values = parallel.average_scalars(logs)
        values |= {f"lr/{role}": o.param_groups[0]["lr"] for role, o in self.optimizers.items()}
        values["steps_per_second"] = rate
        self.record.add(self.step, values)
        return {name: f"{values[name]:.3g}" for name in values if name.endswith("/loss")}

    def _description(self) -> dict[str, Any]:
        run = {"method": type(self.method).__name__, "settings": self.settings, "world_size": parallel.world_size()}
        run |= {"dataset": self.fingerprint, "teacher": self.teacher_digest, "samplers": [sampler.as_dict() for sampler in self.samplers]}
        return run | {"device": str(self.device), **provenance()}

    # ------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write checkpoint-N and return when it is on disk.

        Raises:
            CheckpointError: on every rank, when this or the write before failed. NonFiniteError: for weights that are no numbers.
        """
        self.checkpoints.save(self.step)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of this run.

        Raises:
            InputError: for a damaged checkpoint, or one whose settings, data or number of processes differ in anything that changes
                the result.
        """
        self.step = self.checkpoints.load(path)

    def _checkpoints(self) -> RunCheckpoints:
        state = RunState(self.nets, self.optimizers, self.emas, self.method.followers)
        identity = {"settings": self.settings, "method": type(self.method).__name__}
        identity |= {"world_size": parallel.world_size(), "dataset": self.fingerprint, "teacher": self.teacher_digest}
        return RunCheckpoints(self.output_dir, state, identity, self.config, self.device)


def _digest_of(teacher: nn.Module, config: TrainConfig) -> str:
    """SHA-256 of the weights with which the teacher runs; adapters that an earlier training left on them do not count."""
    remove_adapters(teacher)
    weights = teacher.state_dict()
    if config.mixed_precision == "bf16":
        weights = {name: w.to(torch.bfloat16) if w.is_floating_point() else w for name, w in weights.items()}
    return weights_digest(weights)


def _accelerator(config: TrainConfig) -> Accelerator:
    """Accelerator with the trackers of `report_to`; accelerate alone would drop those whose package is missing."""
    wanted = [name.strip() for name in config.report_to.split(",") if name.strip()]
    try:
        accelerator = Accelerator(log_with=wanted or None, project_dir=config.output_dir)
    except ValueError as error:
        raise reject("report_to", config.report_to, str(error)) from error
    parallel.check_started(accelerator.num_processes)
    missing = set(wanted) - {str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with} - {"all"}
    if missing:
        raise reject("report_to", config.report_to, f"install the package of {', '.join(sorted(missing))} first")
    return accelerator
