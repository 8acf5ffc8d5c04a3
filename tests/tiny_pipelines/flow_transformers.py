"""Tiny pipelines of the large flow-matching transformers: FLUX.1, Qwen-Image, Z-Image."""

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
)

from .parts import TEXT_WIDTH, clip_config, clip_tokenizer, ready, seeded, t5_encoder, t5_tokenizer, vae


def flux(guidance: bool = True, seed: int = 0) -> FluxPipeline:
    """FLUX.1 dev, whose network sees a guidance and whose shift depends on the size, or schnell, with neither: latents (4, 8, 8)."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True) if guidance else FlowMatchEulerDiscreteScheduler()
    with seeded(seed):
        tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=guidance,
            axes_dims_rope=(2, 2, 4),
        )
        pipe = FluxPipeline(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModel(clip_config(tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=t5_encoder(tokenizer_2),
            tokenizer_2=tokenizer_2,
        )
        return ready(pipe, pipe.transformer)


def qwen_image(seed: int = 0) -> QwenImagePipeline:
    """Qwen-Image with its scheduler, whose shift depends on the size and whose grid is stretched to end at .02: latents (4, 8, 8)."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02)
    with seeded(seed):
        tokenizer = qwen_tokenizer()
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=4,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 2, 2),
        )
        pipe = QwenImagePipeline(
            transformer=transformer,
            scheduler=scheduler,
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 1],
                num_res_blocks=1,
                temperal_downsample=[False],
                latents_mean=[0.1, -0.2, 0.3, 0.0],
                latents_std=[1.0, 2.0, 0.5, 1.5],
            ),
            text_encoder=_qwen_vl(tokenizer),
            tokenizer=tokenizer,
        )
        return ready(pipe, pipe.transformer)


def z_image(seed: int = 0) -> ZImagePipeline:
    """Z-Image, shift 3: latents (4, 8, 8). Nine tenths of the network are its time embedding, whose width stands in its code."""
    with seeded(seed):
        tokenizer = qwen_tokenizer()
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=12,
            n_layers=4,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=[2, 2, 2],
            axes_lens=[640, 16, 16],
        )
        pipe = ZImagePipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=_qwen_3(tokenizer),
            tokenizer=tokenizer,
        )
        return ready(pipe, pipe.transformer)


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes as tokens, no merges, and the marks of a chat."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=list(SPECIAL[1:]))
    tokenizer.chat_template = CHAT
    return tokenizer


def _qwen_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    end, _, turn_end, vision_start, vision_end, image = tokenizer.convert_tokens_to_ids(list(SPECIAL))
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        "bos_token_id": end,
        "eos_token_id": turn_end,
        "pad_token_id": end,
    }
    vision = {"depth": 1, "hidden_size": TEXT_WIDTH, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
    marks = {"vision_start_token_id": vision_start, "vision_end_token_id": vision_end, "image_token_id": image, "video_token_id": image}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks))


def _qwen_3(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    end, _, turn_end, *_ = tokenizer.convert_tokens_to_ids(list(SPECIAL))
    return Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            bos_token_id=end,
            eos_token_id=turn_end,
            pad_token_id=end,
        )
    )
