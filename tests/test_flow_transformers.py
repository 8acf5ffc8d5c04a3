"""What FLUX.1, Qwen-Image and Z-Image have of their own: packed latents, prompts of any length, an embedded guidance, bfloat16."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import Exported, in_process  # noqa: F401
from test_families import as_x0, assert_same, conditions_of, denoiser_of, inputs_of, random_input, record, unguided
from tiny_pipelines import PIPELINES
from tiny_pipelines.flow_transformers import flux
from torch import Tensor

from diffusion_distill.errors import InputError
from diffusion_distill.families import family_of
from diffusion_distill.sampler import FewStepSampler

NAMES = ("flux", "qwen_image", "z_image")
UNEVEN = ["a bird", "two red houses on a hill, and a bird that is on neither of them"]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_different_lengths_reach_the_network_as_the_pipeline_sends_them(name: str) -> None:
    pipe = PIPELINES[name]()
    cond = conditions_of(pipe, UNEVEN)
    calls, _ = record(pipe, UNEVEN, num_inference_steps=2, **unguided(pipe))
    for call in calls:
        given, output = inputs_of(pipe, call.x_t, call.t, cond)
        assert_same(given, call.given)
        assert torch.equal(output, call.output)
    if name == "z_image":
        assert len({len(tokens) for tokens in calls[0].given["cap_feats"]}) == 2
    if name == "qwen_image":
        assert not calls[0].given["encoder_hidden_states_mask"].all()


@torch.no_grad()
@pytest.mark.parametrize("name", ("qwen_image", "z_image"))
def test_the_condition_vector_is_the_mean_over_the_prompt_alone(name: str) -> None:
    pipe = PIPELINES[name]()
    family = family_of(pipe)
    vector = family.condition_vector(getattr(pipe, family.component), conditions_of(pipe, UNEVEN))
    for prompt, found in zip(UNEVEN, vector, strict=True):
        tokens = pipe.encode_prompt([prompt], pipe.device)[0][0]  # alone it has no padding
        torch.testing.assert_close(found, tokens.mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ("flux", "qwen_image"))
def test_latents_are_packed_as_the_pipeline_packs_them(name: str) -> None:
    pipe = PIPELINES[name]()
    family, latents = family_of(pipe), torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    expected = pipe._pack_latents(latents, 2, 4, 6, 10)
    assert torch.equal(family.pack(latents), expected) and family.pack(latents).is_contiguous()
    assert torch.equal(family.unpack(expected, latents), latents)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_in_bfloat16_is_repeated_too(name: str) -> None:
    """Weights, latents and what the network is told of the time, all rounded as the pipeline rounds them."""
    pipe = PIPELINES[name]().to(torch.bfloat16)
    cond = {name: value.bfloat16() if value.is_floating_point() else value for name, value in conditions_of(pipe).items()}
    calls, _ = record(pipe, num_inference_steps=3, **unguided(pipe))
    assert len(calls) == 3
    for call in calls:
        given, output = inputs_of(pipe, call.x_t.bfloat16(), call.t, cond)
        assert_same(given, call.given)
        assert torch.equal(output.float(), call.output.float())
        assert torch.isfinite(denoiser_of(pipe)(call.x_t, call.t, cond).x0).all()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_features_are_the_image_tokens(name: str) -> None:
    """Those of the last block, run through the network's last layer alone, are its output."""
    pipe = PIPELINES[name]()
    family, (x_t, t, cond) = family_of(pipe), random_input(pipe)
    model: Any = pipe.transformer
    blocks = {"flux": "single_transformer_blocks", "qwen_image": "transformer_blocks", "z_image": "layers"}[name]
    final = model.all_final_layer["2-1"] if name == "z_image" else model.norm_out
    tokens: list[Tensor] = []
    time: list[Tensor] = []
    getattr(model, blocks)[-1].register_forward_hook(lambda module, args, output: tokens.append(family.feature(output, x_t)))
    final.register_forward_pre_hook(lambda module, args, kwargs: time.append(kwargs.get("c", args[-1])), with_kwargs=True)
    output = family.call(model, x_t, t, cond)
    assert tokens[0].shape[:2] == (2, 16)  # 8x8 latents in patches of 2x2
    if name == "z_image":
        alone = -torch.stack(model.unpatchify(list(final(tokens[0], time[0])), [(1, 8, 8)] * 2, 2, 1)).squeeze(2)
    else:
        alone = as_x0(pipe, model.proj_out(final(tokens[0], time[0])))
    torch.testing.assert_close(alone, output, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_sizes_follow_the_resolution(name: str) -> None:
    """The pipelines' own sizes stand in their code: 128 latents, or 1024 pixels, which are 512 latents of the tiny VAE."""
    pipe = PIPELINES[name]()
    family = family_of(pipe)
    assert family.sample_shape(pipe) == ((4, 512, 512) if name == "z_image" else (4, 128, 128))
    latents = pipe("a", height=20, width=20, output_type="latent", num_inference_steps=2, **unguided(pipe)).images
    assert as_x0(pipe, latents, 20).shape == (1, *family.sample_shape(pipe, 20)) == (1, 4, 10, 10)
    with pytest.raises(InputError, match="resolution: got 18; a positive multiple of 4"):
        family.sample_shape(pipe, 18)


# ------------------------------------------------------------------ embedded guidance


@torch.no_grad()
def test_the_guidance_of_flux_is_the_pipelines_own_and_can_be_another() -> None:
    pipe = flux()
    family, cond = family_of(pipe), conditions_of(pipe)
    assert family.pipeline_call([1000.0], 1000)["guidance_scale"] == float(cond["guidance"][0]) == 3.5
    calls, _ = record(pipe, num_inference_steps=1, guidance_scale=5.0)
    stronger = family.with_guidance(pipe.transformer, cond, torch.full((2,), 5.0))
    given, output = inputs_of(pipe, calls[0].x_t, calls[0].t, stronger)
    assert_same(given, calls[0].given)
    assert torch.equal(output, calls[0].output)
    assert not torch.equal(family.call(pipe.transformer, calls[0].x_t, calls[0].t, cond), output)


def test_a_flux_student_is_exported_at_the_guidance_it_was_trained_at(tmp_path: Path, in_process: None) -> None:  # noqa: F811
    sampler = FewStepSampler((500.0,), "ode", guidance_embedding=5.0)
    exported = Exported(tmp_path / "student", flux, 2, "ode", others=[sampler])
    assert exported.verify(atol=1e-6)["timesteps"] == [[1000.0, 500.0], [500.0]]


def test_schnell_sees_no_guidance() -> None:
    pipe = flux(guidance=False)
    family, cond = family_of(pipe), conditions_of(pipe)
    assert cond.keys() == {"prompt_embeds", "pooled"}
    with pytest.raises(InputError, match="guidance: got 'embedded'.*'flux'"):
        family.with_guidance(pipe.transformer, cond, torch.ones(2))
