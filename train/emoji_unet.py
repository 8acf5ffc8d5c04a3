"""The denoiser of the emoji pipeline: a `UNet2DConditionModel` on 4x8x8 latents, trained as the pipeline calls it."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion_distill.denoiser import Denoiser
from diffusion_distill.families import family_of
from diffusion_distill.schedule import NoiseSchedule, prediction_type_of
from diffusion_distill.score_distillation import denoising_score_matching

CAPTION_DROPOUT = 0.1


def new_pipeline(vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The pipeline with an untrained UNet of four million parameters; captions reach it on the 4x4 level."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=4,  # which is the number of heads
        norm_num_groups=16,
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False, steps_offset=1
    )
    return StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)


class UnetTraining:
    """Denoising score matching on latents (N, 4, h, w) with their captions, a tenth of them dropped."""

    def __init__(self, pipe: StableDiffusionPipeline, latents: Tensor, captions: list[str]):
        family = family_of(pipe)
        self.schedule = NoiseSchedule.from_scheduler(pipe.scheduler)
        self.denoiser = Denoiser(pipe.unet, self.schedule, prediction_type_of(pipe.scheduler), family)
        distinct = ["", *sorted(set(captions))]
        rows = {caption: i for i, caption in enumerate(distinct)}
        self.latents, self.caption = latents, torch.tensor([rows[caption] for caption in captions])
        self.embeds = family.encode_conditions(pipe, distinct)["prompt_embeds"]

    def loss(self, index: list[int], generator: torch.Generator) -> Tensor:
        """Squared error of v at random noise levels."""
        x0 = self.latents[index]
        level, drop = torch.rand(2, len(index), generator=generator)
        caption = self.caption[index].masked_fill(drop < CAPTION_DROPOUT, 0)
        eps = torch.randn(x0.shape, generator=generator)
        return denoising_score_matching(self.denoiser, x0, eps, self.schedule.timestep(level), {"prompt_embeds": self.embeds[caption]})
