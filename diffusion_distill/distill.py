"""From a pipeline to an exported student in one call."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from . import parallel
from .build import load_pipeline
from .config import TeacherConfig, to_mapping
from .data import DataConfig, build_dataset, pair_settings
from .export import check_exportable, export_student, push_to_hub, verify_export
from .families import family_of
from .methods import METHODS, Method
from .pair_settings import pair_warnings
from .preflight import check_input
from .provenance import provenance, write_json
from .redaction import redacted
from .train_config import TrainConfig
from .trainer import Trainer

STUDENT = "student"
LOOP_SETTINGS = (
    "max_train_steps",
    "learning_rate",
    "lr_scheduler",
    "ema_decay",
    "lora_rank",
    "sharing",
    "mixed_precision",
    "seed",
)  # for the card


def distill(
    pipe: Any,
    method: Method,
    dataset: Dataset[Any],
    config: TrainConfig,
    *,
    teacher: str | None = None,
    resolution: int | None = None,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Train a student of the diffusers pipeline `pipe`, export it, and prove the export; the student's folder.

    Args:
        pipe: the teacher's pipeline.
        method: the hyper-parameters of a method, such as `DMD2(...)`.
        dataset: items {"condition": prompt or class label, "image": (C, H, W) in [-1, 1] where the method needs images}.
        config: settings of the loop; `config.output_dir/student` is the result.
        teacher: what the model card calls the teacher.
        resolution: pixels of a side. None: the pipeline's own.
        settings: more to remember in run.json.

    Raises:
        InputError: for a wrong setting. NonFiniteError: when training diverges.
    """
    trainer = Trainer(pipe, method, config, dataset, resolution, settings)
    check_exportable(pipe, trainer.nets.student, trainer.samplers, trainer.family)
    if (pairs := pair_settings(dataset)) and trainer.accelerator.is_main_process:
        for line in pair_warnings(pairs, method.expected_pairs, max(len(sampler.timesteps) for sampler in trainer.samplers)):
            print("warning:", line, file=sys.stderr)
    trainer.train()
    trainer.release()
    folder = trainer.output_dir / STUDENT
    if trainer.accelerator.is_main_process:
        _export(trainer, pipe, folder, teacher)
        if config.push_to_hub:
            print("uploaded to", push_to_hub(folder, config.hub_model_id or trainer.output_dir.name))
    parallel.meet(config.rank_timeout)
    return folder


def run(method: Method, teacher: TeacherConfig, data: DataConfig, config: TrainConfig) -> Path:
    """`distill` with everything read from configuration, as the command line does."""
    check_input(teacher, data, config, needs_images=method.needs_images, needs_pairs=method.needs_pairs)
    pipe = load_pipeline(teacher)
    family = family_of(pipe)
    channels, side = family.image_shape(pipe, data.resolution)
    dataset = build_dataset(
        data,
        needs_images=method.needs_images,
        needs_pairs=method.needs_pairs,
        channels=channels,
        resolution=side,
        num_classes=family.num_classes(pipe),
    )
    settings = to_mapping(teacher, data)
    return distill(
        pipe,
        method,
        dataset,
        config,
        teacher=teacher.pretrained_model_name_or_path,
        resolution=data.resolution,
        settings=settings,
    )


def _export(trainer: Trainer, pipe: Any, folder: Path, teacher: str | None) -> None:
    conditions = trainer.validation_conditions()
    name = next(key for key, kind in METHODS.items() if type(trainer.method) is kind)
    loop = {key: value for key, value in to_mapping(trainer.config).items() if key in LOOP_SETTINGS}
    loop["global_batch_size"] = trainer.global_batch_size
    info = redacted({"method": name, "hyper_parameters": to_mapping(trainer.method) | loop, "teacher": teacher}) | provenance()
    with trainer.student_weights(), torch.no_grad():
        export_student(
            pipe,
            trainer.nets.student,
            trainer.samplers,
            folder,
            family=trainer.family,
            info=info,
            conditions=conditions,
            images=trainer.sample(conditions),
            resolution=trainer.resolution,
        )
        proof = verify_export(
            folder,
            student=trainer.nets.student,
            samplers=trainer.samplers,
            family=trainer.family,
            pipe=pipe,
            conditions=conditions[:4],
            trust_remote_code=True,  # the folder was just written by this process
        )
    write_json(folder / "verification.json", proof)
    print(f"student in {folder}: plain diffusers visits {proof['timesteps']}, largest image difference {proof['max_difference']:.1e}")
