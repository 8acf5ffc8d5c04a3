"""From a pretrained pipeline to the networks of a method."""

import copy
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import HF_MODULES_CACHE
from filelock import FileLock
from torch import nn

from . import attention
from .adapters import Adapter, adapter_parameters, add_adapter, checkpointed, remove_adapters
from .config import TeacherConfig
from .denoiser import Denoiser
from .errors import InputError, reject
from .families import Cond, family_of
from .methods import Method
from .networks import Networks, trainable_copy
from .prediction import PREDICTION_TYPES
from .random import derive_seed
from .schedule import NoiseSchedule, prediction_type_of
from .sharding import shard
from .train_config import TrainConfig


def load_pipeline(teacher: TeacherConfig, components: Mapping[str, nn.Module] | None = None, folder: str | None = None) -> Any:
    """Load a diffusers pipeline from a folder or the hub, with `components` in the place of those that it would load, from `folder`.

    Raises:
        InputError: when diffusers cannot load it, with its reason in one line; for a `video_size` that it cannot draw.
    """
    options = {"revision": teacher.revision, "variant": teacher.variant, "trust_remote_code": teacher.trust_remote_code}
    options["use_safetensors"] = None if teacher.allow_bin_weights else True
    try:
        with _pipeline_code_to_itself() if teacher.trust_remote_code else nullcontext():
            pipe = DiffusionPipeline.from_pretrained(folder or teacher.pretrained_model_name_or_path, **options, **(components or {}))
    except Exception as error:  # whatever a damaged folder, or code of its own, makes diffusers and transformers raise
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        reason = kind + " ".join(str(error).split())
        if "safetensors" in reason and not teacher.allow_bin_weights:
            reason += " (weights stored as .bin alone are read with --allow_bin_weights)"
        raise InputError(f"pretrained_model_name_or_path: cannot load {teacher.pretrained_model_name_or_path!r}: {reason}") from error
    if teacher.video_size:
        family_of(pipe).set_video_size(pipe, *teacher.video_size)
    return pipe


@contextmanager
def _pipeline_code_to_itself() -> Iterator[None]:
    """diffusers copies a folder's own code into a cache that all processes share, at every load: another could read half of it."""
    cache = Path(HF_MODULES_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "loading.lock"):
        yield


def teacher_denoiser(pipe: Any) -> Denoiser:
    """The pipeline's own network, frozen, in evaluation mode. InputError: a pipeline of several networks."""
    family = family_of(pipe)
    for name in family.expert_components:
        if (later := pipe.components.get(name)) is not None:
            raise reject(name, type(later).__name__, "a teacher of one network; this pipeline changes to another on the way")
    model = getattr(pipe, family.component)
    model.requires_grad_(False).eval()
    kind = prediction_type_of(pipe.scheduler)
    if kind not in PREDICTION_TYPES:
        raise reject("scheduler.prediction_type", kind, "accepted: " + ", ".join(PREDICTION_TYPES))
    return Denoiser(model, NoiseSchedule.from_scheduler(pipe.scheduler), kind, family)


def build_networks(pipe: Any, method: Method, config: TrainConfig, resolution: int | None = None, uncond: Cond | None = None) -> Networks:
    """Teacher, trained copies and extra networks of `method`, on the pipeline's device; the same on every rank.

    With `lora_rank` a copy is an adapter: on a frozen copy of its own, or, with `sharing` "shared", on the teacher's own weights.
    `uncond` is the unconditional condition of one sample, None to encode it here.
    """
    teacher = teacher_denoiser(pipe)
    remove_adapters(teacher.model)  # of an earlier training from this pipeline
    device = pipe.device
    if config.parallelism == "shard":
        teacher.model.to("cpu")  # copies are made there: one device need not hold them
    bf16 = config.mixed_precision == "bf16"
    teacher.autocast_dtype = torch.bfloat16 if bf16 else None
    copies: dict[str, Denoiser] = {}
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.seed, 0x1217))
        for role in method.copies:
            changed = method.student_model if role in method.student_roles else None
            copies[role] = _shared(teacher, changed) if config.sharing == "shared" else _copied(teacher, config, changed)
        if bf16:
            teacher.model.to(torch.bfloat16)
        lora = dict.fromkeys(method.copies if config.lora_rank else (), Adapter(config.lora_rank, config.lora_alpha or config.lora_rank))
        adapted = {role: _adapted(copies.get(role, teacher), role, a, config) for role, a in (lora | method.adapters).items()}
        for denoiser in (teacher, *(copies | adapted).values()):
            denoiser.batch_guidance = config.batch_guidance
        followers = {role: _follower((copies | adapted)["student"], role, lora.get("student"), config) for role in method.followers}
        if config.parallelism == "shard":
            _shard([teacher, *(copies | adapted | followers).values()], device)
        x_t = torch.zeros(1, *teacher.family.sample_shape(pipe, resolution), device=device)
        t = teacher.schedule.timestep(torch.full((1,), 0.5, device=device))
        with torch.no_grad():
            extra = method.extra_networks(teacher, x_t, t, uncond or teacher.family.unconditional(pipe, 1, resolution))
    nets = Networks(teacher=teacher, **(copies | extra | adapted))
    nets.add(**followers)
    nets.add(**method.views(nets))
    return nets


def attention_switches(nets: Networks, config: TrainConfig, shape: tuple[int, ...], *conds: Cond) -> list[attention.Switch]:
    """What `attention_backend` switches in the networks of a run, tried on one sample (`shape`) under each of `conds`.

    Raises:
        InputError: where a network cannot run with it.
    """
    networks = {role: net for role in nets if isinstance(net := getattr(nets, role), Denoiser)}
    cond = {name: torch.cat([each[name] for each in conds]) for name in conds[0]}
    device = next(iter(cond.values())).device
    x_t, t = torch.zeros(len(conds), *shape, device=device), torch.full((len(conds),), 0.5, device=device)
    return attention.prepared(networks, config.attention_backend, x_t, nets.teacher.schedule.timestep(t), cond)


def _shard(networks: Iterable[Denoiser], device: torch.device) -> None:
    """Spread the distinct models of `networks` over the ranks."""
    for model, family in {denoiser.model: denoiser.family for denoiser in networks}.items():
        shard(model, family.called_alone(model), family.taps(model), device)


def _copied(teacher: Denoiser, config: TrainConfig, changed: Callable[[nn.Module], nn.Module] | None) -> Denoiser:
    """A trainable copy of the teacher, or the network that `changed` makes of it."""
    copied: Any = trainable_copy(teacher)
    copied.family = teacher.family
    if changed is not None:
        copied.model = changed(copied.model).float().requires_grad_(True).train()
    if config.lora_rank:
        own = {name: p.shape for name, p in copied.model.named_parameters()}
        if any(own.get(name) != p.shape for name, p in teacher.model.named_parameters()):
            raise reject(
                "lora_rank", config.lora_rank, "0 for a student that is another network than the teacher's: its weights are random"
            )
        copied.requires_grad_(False)
    elif config.gradient_checkpointing:
        copied.model.enable_gradient_checkpointing()
    trained: Denoiser = copied
    return trained


def _shared(teacher: Denoiser, changed: Callable[[nn.Module], nn.Module] | None) -> Denoiser:
    if changed is not None and changed(teacher.model) is not teacher.model:
        raise reject("sharing", "shared", "'full' for this method: its student is another network than the teacher's")
    return teacher


def _adapted(base: Any, role: str, adapter: Adapter, config: TrainConfig) -> Denoiser:
    """A role on the weights of `base`, with nothing of its own but an adapter."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(config.seed, 0xADA, zlib.crc32(role.encode())))
        add_adapter(base.model, role, replace(adapter, targets=adapter.targets or tuple(base.family.lora_targets)))
    if config.gradient_checkpointing:
        base.model.enable_gradient_checkpointing(checkpointed)
    return Denoiser(base.model, base.schedule, base.prediction_type, base.family, base.autocast_dtype, role)


@torch.no_grad()
def _follower(student: Denoiser, role: str, adapter: Adapter | None, config: TrainConfig) -> Denoiser:
    """A copy of the student as it starts; of an adapter on the same weights where the student is one."""
    if adapter is None:
        return copy.deepcopy(student)
    follower = _adapted(student, role, adapter, config)
    own, followed = (adapter_parameters(student.model, name).values() for name in (role, str(student.adapter)))
    for p, q in zip(own, followed, strict=True):
        p.copy_(q)
    return follower
