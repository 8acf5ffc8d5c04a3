"""Train the embedded teacher: a class-conditional `UNet2DModel` (368k parameters) on scikit-learn's 8x8 digits.

Command:   python train/digits_teacher.py --output_dir outputs/teacher-flow
Hardware:  one CPU core, about a minute.
Result:    a diffusers folder that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads. Its Frechet
           distance is .531 at 8 steps and .511 at 50 (flow; docs/results.md).
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from tqdm.auto import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from diffusion_distill.batches import GlobalBatchSampler
from diffusion_distill.config import parse, run_cli
from diffusion_distill.data import DataConfig, build_dataset
from diffusion_distill.denoiser import Denoiser
from diffusion_distill.ema import EMA
from diffusion_distill.families import family_of
from diffusion_distill.schedule import NoiseSchedule, prediction_type_of
from diffusion_distill.score_distillation import denoising_score_matching
from pipelines.class_conditional import ClassConditionalPipeline

CLASSES = 10
STABLE_DIFFUSION_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass
class TeacherTraining:
    process: Literal["flow", "v_prediction", "epsilon"] = "flow"
    """Flow matching, or DDPM with v- or epsilon-prediction."""
    output_dir: str = "outputs/digits-teacher"
    """Folder of the pipeline."""
    seed: int = 0
    """Seed of the initial weights, the batches and the noise."""
    max_train_steps: int = 1600
    """Optimizer steps."""
    train_batch_size: int = 64
    """Images a step."""
    learning_rate: float = 2e-3
    """Peak learning rate; 50 steps of warm-up, then a cosine to zero."""
    label_dropout: float = 0.1
    """Share of images trained without their label."""
    ema_decay: float = 0.998
    """Decay of the moving average that is saved."""


def digits_pipeline(process: str) -> ClassConditionalPipeline:
    """The untrained teacher as a pipeline."""
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(24, 48),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        num_class_embeds=CLASSES + 1,
    )
    if process == "flow":
        return ClassConditionalPipeline(unet, FlowMatchEulerDiscreteScheduler(shift=1.0))
    # An epsilon error reaches x0 times sigma / alpha: 15 at the noisiest step of these betas, 20,000 at that of the cosine.
    betas = {"beta_schedule": "squaredcos_cap_v2"} if process == "v_prediction" else STABLE_DIFFUSION_BETAS
    scheduler = DDIMScheduler(prediction_type=process, timestep_spacing="trailing", clip_sample=False, **betas)
    return ClassConditionalPipeline(unet, scheduler)


def main() -> None:
    (config,) = parse(None, TeacherTraining, prog="digits_teacher.py", description=__doc__ or "")
    torch.manual_seed(config.seed)
    pipe = digits_pipeline(config.process)
    schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
    denoiser = Denoiser(pipe.unet, schedule, prediction_type_of(pipe.scheduler), family_of(pipe)).train()
    data = build_dataset(DataConfig(dataset="digits"), needs_images=True, channels=1, resolution=8)
    images = torch.stack([data[i]["image"] for i in range(len(data))])
    labels = torch.tensor([data[i]["condition"] for i in range(len(data))])
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    schedule_lr = get_cosine_schedule_with_warmup(optimizer, 50, config.max_train_steps)
    ema = EMA(dict(denoiser.named_parameters()), config.ema_decay)
    order = GlobalBatchSampler(len(data), config.train_batch_size, config.seed)
    for step in tqdm(range(config.max_train_steps), desc=f"teacher ({config.process})"):
        index = torch.tensor(order.indices(step))
        dropped = torch.rand(len(index)) < config.label_dropout
        cond = {"class_labels": labels[index].masked_fill(dropped, CLASSES)}
        t = schedule.timestep(torch.rand(len(index)))
        loss = denoising_score_matching(denoiser, images[index], torch.randn(len(index), 1, 8, 8), t, cond)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule_lr.step()
        ema.update()
    with ema.applied():
        pipe.save_pretrained(config.output_dir)
    print(f"teacher saved in {config.output_dir}")


if __name__ == "__main__":
    run_cli(main)
