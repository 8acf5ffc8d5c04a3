"""The flow-matching transformer of the emoji: a `StableDiffusion3Pipeline` on the latents of the UNet's pipeline, and its training."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline
from emoji_training import CaptionedImages, DenoiserTraining
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from diffusion_distill.time_laws import logit_normal

T5_TOKENS = 256  # of every prompt, in the stock pipeline


def new_transformer(text_width: int, layers: int = 4, heads: int = 4) -> SD3Transformer2DModel:
    """The untrained transformer, 2.3 million parameters; its blocks hand their input on and its output is zero (DiT, arXiv:2212.09748)."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=32,
        joint_attention_dim=2 * text_width,
        caption_projection_dim=32 * heads,
        pooled_projection_dim=2 * text_width,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    modulations = [norm.linear for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for layer in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def with_projection(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The same text encoder, its pooled output handed on through the unit matrix."""
    config = CLIPTextConfig.from_dict(encoder.config.to_dict() | {"projection_dim": encoder.config.hidden_size})
    projecting = CLIPTextModelWithProjection(config)
    projecting.text_model.load_state_dict(encoder.state_dict())
    nn.init.eye_(projecting.text_projection.weight)
    return projecting.eval()


def silent_t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 whose tokens are zero whatever the prompt, as those of a pipeline without T5; diffusers cannot load such a one by its folder."""
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0, model_max_length=T5_TOKENS)
    size = {"d_model": width, "d_kv": 1, "d_ff": 1, "num_layers": 1, "num_heads": 1, "relative_attention_num_buckets": 8}
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **size))
    for weight in encoder.parameters():
        nn.init.zeros_(weight)
    return encoder.eval(), tokenizer


def new_pipeline(parts: StableDiffusionPipeline, transformer: SD3Transformer2DModel) -> StableDiffusion3Pipeline:
    """The pipeline of `transformer` with the autoencoder of `parts`, and with its text encoder in both CLIP slots."""
    parts.vae.register_to_config(shift_factor=0.0)  # its latents have zero mean and unit deviation; this pipeline asks for both numbers
    encoder, tokenizer = with_projection(parts.text_encoder), parts.tokenizer
    t5, t5_tokenizer = silent_t5(transformer.config.joint_attention_dim)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return StableDiffusion3Pipeline(transformer, scheduler, parts.vae, encoder, tokenizer, encoder, tokenizer, t5, t5_tokenizer)


class LastTextTokenRepeated(TorchFunctionMode):
    """Attention as if the last key were there `count` times, which adds ln(count) to its logits.

    Text tokens have no place, so the zero tokens of T5 are equal in every block: one of their common weight is the same network at a tenth
    of the cost.
    """

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            query, key = args[:2]
            bias = query.new_zeros(query.shape[-2], key.shape[-2])
            bias[:, -1] = math.log(self.count)
            kwargs = kwargs | {"attn_mask": bias}
        return function(*args, **kwargs)


class FlowTraining(DenoiserTraining):
    """Rectified flow, eps - x0 at (1 - sigma) x0 + sigma eps with logit-normal sigma (arXiv:2403.03206, sec. 3.1)."""

    def __init__(self, pipe: StableDiffusion3Pipeline, images: CaptionedImages):
        super().__init__(pipe, images, lambda uniform: logit_normal(uniform, 0.0, 1.0))
        self.cond["prompt_embeds"] = self.cond["prompt_embeds"][:, : pipe.tokenizer_max_length + 1].clone()

    def loss(self, index: list[int], generator: torch.Generator) -> Tensor:
        with LastTextTokenRepeated(T5_TOKENS):
            return super().loss(index, generator)
