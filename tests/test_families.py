"""Every family against the pipeline it adapts: what the pipeline feeds its network, gets back and makes of it is the oracle."""

import copy
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from peft import LoraConfig, inject_adapter_in_model
from tiny_pipelines import (
    PIPELINES,
    class_conditional,
    example_conditions,
    resolution_of,
    size_arguments,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
)
from torch import Tensor

from diffusion_distill.denoiser import Denoiser
from diffusion_distill.errors import InputError
from diffusion_distill.families import family_of
from diffusion_distill.prediction import Prediction
from diffusion_distill.schedule import NoiseSchedule, RectifiedFlow, expand_dims, prediction_type_of

TEXT = tuple(name for name in PIPELINES if not name.startswith("class"))
IMAGES = tuple(name for name in TEXT if name != "wan")
# Calls of a pipeline with classifier-free guidance off and on, where they are not {"guidance_scale": 1.0} and {"guidance_scale": 2.0}.
UNGUIDED: dict[str, dict[str, Any]] = {"FluxPipeline": {}, "QwenImagePipeline": {"true_cfg_scale": 1.0}}
UNGUIDED["ZImagePipeline"] = {"guidance_scale": 0.0}
GUIDED: dict[str, dict[str, Any]] = {"FluxPipeline": {"true_cfg_scale": 2.0, "negative_prompt": ["", ""]}}
GUIDED["QwenImagePipeline"] = {"true_cfg_scale": 2.0, "negative_prompt": [" ", " "]}
BEHIND_THE_TAPS = {
    "flux": lambda model: model.single_transformer_blocks[-1],
    "qwen_image": lambda model: model.norm_out,
    "z_image": lambda model: next(iter(model.all_final_layer.values())),
    "wan": lambda model: model.blocks[-1],
    "unet": lambda model: model.up_blocks[0],
    "transformer": lambda model: model.transformer_blocks[-1],
}


@dataclass
class NetworkCall:
    """What the pipeline handed to its network in one step, and what it made of the output before it stepped."""

    given: dict[str, Any]  # arguments by name, without those that are off
    x_t: Tensor  # as the family has it
    t: Tensor  # (B,) of the scheduler's step that followed
    output: Tensor  # what that step took, as the family has it


def arguments(module: torch.nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Inputs by name, None and empty options left out, a scalar timestep for the whole batch."""
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    given |= given.pop("added_cond_kwargs", None) or {}
    kept = {name: value for name, value in given.items() if not (value is None or value == {}) and name != "return_dict"}
    if "timestep" in kept:
        kept["timestep"] = kept["timestep"].expand(len(next(iter(kept.values()))))
    return kept


def as_x0(pipe: Any, value: Tensor | list[Tensor], resolution: int | None = None) -> Tensor:
    """A pipeline's latents, or its network's input, in the layout of an x0; the pipeline's own functions unpack."""
    if isinstance(value, list):
        value = torch.stack(value)
    if value.ndim == 3:
        side = resolution or resolution_of(pipe)
        value = pipe._unpack_latents(value, side, side, pipe.vae_scale_factor)
    image = value.ndim == 5 and value.shape[2] == 1
    return value.squeeze(2) if image else value


def record(pipe: Any, conditions: list[Any] | None = None, **call: Any) -> tuple[list[NetworkCall], Tensor]:
    """Run the pipeline on two conditions; its network calls and its images (B, C, H, W) in [0, 1]."""
    family, calls, waiting = family_of(pipe), [], []
    step = pipe.scheduler.step

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        waiting.append(arguments(module, args, kwargs))

    @functools.wraps(step)
    def recorded_step(model_output: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        for given in waiting:
            x_t = as_x0(pipe, next(iter(given.values())))
            calls.append(NetworkCall(given, x_t, timestep.expand(len(x_t)), as_x0(pipe, model_output)))
        waiting.clear()
        return step(model_output, timestep, *args, **kwargs)

    pipe.scheduler.step = recorded_step
    handle = getattr(pipe, family.component).register_forward_hook(hook, with_kwargs=True)
    call = size_arguments(pipe) | call
    condition = family.condition_argument(conditions or example_conditions(pipe))
    try:
        images = pipe(**condition, **call, generator=torch.Generator().manual_seed(0), output_type="pt", return_dict=False)[0]
    finally:
        handle.remove()
        del pipe.scheduler.step
    return calls, images


def inputs_of(pipe: Any, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    """What the family's own call hands to the network, and its output."""
    family, found = family_of(pipe), []
    network = getattr(pipe, family.component)
    hook = network.register_forward_pre_hook(lambda module, args, kwargs: found.append(arguments(module, args, kwargs)), with_kwargs=True)
    try:
        output = family.call(network, x_t, t, cond)
    finally:
        hook.remove()
    return found[0], output


def assert_same(given: Any, expected: Any, where: str = "") -> None:
    """Equal to the last bit, through dictionaries, lists and tuples."""
    if isinstance(expected, Tensor):
        assert given.shape == expected.shape and torch.equal(given.to(expected.dtype), expected), where
    elif isinstance(expected, dict):
        assert given.keys() == expected.keys(), where
        for name in expected:
            assert_same(given[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, list | tuple):
        assert len(given) == len(expected), where
        for i, (a, b) in enumerate(zip(given, expected)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert given == expected, where


def unguided(pipe: Any) -> dict[str, Any]:
    return UNGUIDED.get(type(pipe).__name__, {"guidance_scale": 1.0})


def guided(pipe: Any) -> dict[str, Any]:
    return GUIDED.get(type(pipe).__name__, {"guidance_scale": 2.0})


def unconditional_part(pipe: Any, calls: list[NetworkCall]) -> dict[str, Any]:
    """Inputs of the unconditional half of a guided step on two samples: the first half of the batch, or a second call."""
    if len(calls) == 2:
        return calls[1].given
    half = slice(2, None) if type(pipe).__name__ in ("ZImagePipeline", "DiTPipeline") else slice(2)
    return {name: value[half] if isinstance(value, Tensor | list) else value for name, value in calls[0].given.items()}


def denoiser_of(pipe: Any) -> Denoiser:
    family = family_of(pipe)
    schedule, prediction_type = NoiseSchedule.from_scheduler(pipe.scheduler), prediction_type_of(pipe.scheduler)
    return Denoiser(getattr(pipe, family.component), schedule, prediction_type, family)


def predicted(pipe: Any, call: NetworkCall) -> Prediction:
    """What the output means at the sigma that the scheduler steps with."""
    denoiser, t = denoiser_of(pipe), stepped(pipe, call.t)
    alpha, sigma = (expand_dims(coefficient(t), call.x_t) for coefficient in (denoiser.schedule.alpha, denoiser.schedule.sigma))
    return Prediction.from_output(call.output, denoiser.prediction_type, call.x_t, alpha, sigma)


def stepped(pipe: Any, t: Tensor) -> Tensor:
    """The timesteps (B,) at that sigma; on flow-matching sigmas, DPM-Solver and UniPC give the network the whole part alone."""
    scheduler = pipe.scheduler
    if not scheduler.config.get("use_flow_sigmas"):
        return t
    index = scheduler.timesteps.tolist().index(t[0])
    return (scheduler.config.num_train_timesteps * scheduler.sigmas[index].double()).expand(len(t))


def random_input(pipe: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    family, generator = family_of(pipe), torch.Generator().manual_seed(1)
    x_t = torch.randn(2, *family.sample_shape(pipe, resolution_of(pipe)), generator=generator)
    return x_t, torch.tensor([501, 120]), conditions_of(pipe)


def conditions_of(pipe: Any, conditions: list[Any] | None = None) -> dict[str, Tensor]:
    return family_of(pipe).encode_conditions(pipe, conditions or example_conditions(pipe), resolution_of(pipe))


@pytest.fixture(scope="module", params=list(PIPELINES))
def pipe(request: pytest.FixtureRequest) -> Any:
    return PIPELINES[request.param]()


@torch.no_grad()
def test_denoiser_repeats_the_pipelines_network_calls(pipe: Any) -> None:
    denoiser, family = denoiser_of(pipe), family_of(pipe)
    cond = conditions_of(pipe)
    calls, _ = record(pipe, num_inference_steps=2, **unguided(pipe))
    assert len(calls) == 2
    for call in calls:
        assert call.x_t.shape == (2, *family.sample_shape(pipe, resolution_of(pipe)))
        given, output = inputs_of(pipe, call.x_t, call.t, cond)
        assert_same(given, call.given)
        assert torch.equal(output, call.output)
        view = denoiser(call.x_t, call.t, cond).view(denoiser.prediction_type)
        torch.testing.assert_close(view, call.output, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_unconditional_is_what_the_pipeline_guides_with(pipe: Any) -> None:
    uncond = family_of(pipe).unconditional(pipe, 2, resolution_of(pipe))
    calls, _ = record(pipe, num_inference_steps=2, **guided(pipe))
    calls = [call for call in calls if torch.equal(call.t[:1], calls[0].t[:1])]
    assert sum(len(call.x_t) for call in calls) == 4
    given, _ = inputs_of(pipe, calls[0].x_t[:2], calls[0].t[:2], uncond)
    assert_same(given, unconditional_part(pipe, calls))


@torch.no_grad()
def test_unconditional_without_zeros_is_the_empty_prompt() -> None:
    pipe = stable_diffusion_xl()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    uncond = family_of(pipe).unconditional(pipe, 2)
    calls, _ = record(pipe, num_inference_steps=1, guidance_scale=2.0)
    assert torch.equal(uncond["prompt_embeds"], calls[0].given["encoder_hidden_states"][:2])
    assert uncond["prompt_embeds"].abs().max() > 0


@torch.no_grad()
def test_one_deterministic_step_is_renoising_with_the_predicted_noise(pipe: Any) -> None:
    """x_t' = alpha(t') x0 + sigma(t') eps: DDIM, Euler, DPM-Solver's and UniPC's first step. Their tables are float32, hence 1e-5."""
    first, second = record(pipe, num_inference_steps=2, **unguided(pipe))[0]
    pred = predicted(pipe, first)
    x_t = denoiser_of(pipe).schedule.add_noise(pred.x0, pred.eps, stepped(pipe, second.t))
    torch.testing.assert_close(x_t, second.x_t, rtol=1e-5, atol=1e-5 * float(second.x_t.abs().max()))


@torch.no_grad()
def test_last_prediction_decodes_to_the_pipelines_images(pipe: Any) -> None:
    denoiser, family = denoiser_of(pipe), family_of(pipe)
    calls, images = record(pipe, num_inference_steps=2, **unguided(pipe))
    pred = predicted(pipe, calls[-1])
    last = pred.x0
    if pipe.scheduler.config.get("set_alpha_to_one") is False:  # Stable Diffusion's DDIM stops at timestep 0, which has noise
        last = denoiser.schedule.add_noise(pred.x0, pred.eps, torch.zeros(2, dtype=torch.long))
    decoded = family.decode(pipe, last)
    assert images.std() > 0.05
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), images, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", IMAGES)
def test_encoding_then_decoding_is_the_vaes_own_reconstruction(name: str) -> None:
    pipe = PIPELINES[name]()
    family = family_of(pipe)
    channels, side = family.image_shape(pipe, resolution_of(pipe))
    images = torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x0 = family.encode_images(pipe, images)
    assert x0.shape == (2, *family.sample_shape(pipe, resolution_of(pipe)))
    assert torch.equal(x0, family.encode_images(pipe, images))
    if not isinstance(pipe.vae, AutoencoderKL | AutoencoderDC):  # videos of one frame
        images = images.unsqueeze(2)
    encoded = pipe.vae.encode(images)
    mean = encoded.latent if isinstance(pipe.vae, AutoencoderDC) else encoded.latent_dist.mean
    expected = pipe.vae.decode(mean).sample
    torch.testing.assert_close(family.decode(pipe, x0), as_x0(pipe, expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x0, as_x0(pipe, whitened(pipe.vae.config, mean)), rtol=1e-6, atol=1e-6)


def whitened(config: Any, mean: Tensor) -> Tensor:
    """The VAE's latents (B, C, ...) as its network knows them: shifted and scaled, in each channel where the configuration says so."""
    if config.get("latents_mean") is None:
        return (mean - (config.get("shift_factor") or 0)) * config.scaling_factor
    offset, spread = (torch.tensor(values).reshape(-1, *[1] * (mean.ndim - 2)) for values in (config.latents_mean, config.latents_std))
    return (mean - offset) / spread


@torch.no_grad()
def test_channelwise_whitened_latents_decode_as_in_the_pipeline() -> None:
    pipe = stable_diffusion_xl()
    pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    family = family_of(pipe)
    latents = pipe("a", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="latent").images
    images = pipe("a", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="pt").images
    decoded = family.decode(pipe, latents)
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), images, rtol=1e-5, atol=1e-5)
    reconstruction = pipe.vae.decode(pipe.vae.encode(decoded).latent_dist.mean).sample
    torch.testing.assert_close(family.decode(pipe, family.encode_images(pipe, decoded)), reconstruction, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_half_precision_vae_runs_in_float32() -> None:
    pipe = stable_diffusion_xl()
    pipe.vae.half()
    family, x0 = family_of(pipe), random_input(pipe)[0]
    decoded = family.decode(pipe, x0)
    assert pipe.vae.dtype == torch.float16
    expected = pipe.vae.float().decode(x0 / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(decoded, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_features_stop_early_and_carry_gradients(name_of_pipe: str, gradient_checkpointing: bool) -> None:
    pipe = PIPELINES[name_of_pipe]()
    denoiser = denoiser_of(pipe)
    if gradient_checkpointing:
        denoiser.model.train().enable_gradient_checkpointing()
    runs: list[int] = []
    family = family_of(pipe)
    behind = BEHIND_THE_TAPS.get(family.name) or BEHIND_THE_TAPS[family.component]
    behind(denoiser.model).register_forward_pre_hook(lambda *_: runs.append(1))
    x_t, t, cond = random_input(pipe)
    x_t.requires_grad_(True)
    features = denoiser.features(x_t, t, cond)
    assert runs == []
    assert features
    for feature in features:
        assert feature.shape in (
            (2, 16, 4, 4),
            (2, 16, 16),
            (2, 16, 24),
            (2, 16, 12),
            (2, 64, 16),
            (2, 8, 24),
        )  # 16 channels at half the size of x_t, or 16 tokens of 2x2
        (gradient,) = torch.autograd.grad(feature.square().mean() + feature.pow(3).mean(), x_t, retain_graph=True)
        assert (gradient.flatten(1).norm(dim=1) > 0).all()
    denoiser(x_t, t, cond)
    assert runs  # the same hook does see a whole pass, so that zero above means something


@pytest.fixture(
    params=[
        "stable_diffusion",
        "stable_diffusion_xl",
        "stable_diffusion_3",
        "pixart_alpha",
        "sana",
        "wan",
        "flux",
        "qwen_image",
        "z_image",
        "class_conditional_flow",
    ]
)
def name_of_pipe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.no_grad()
def test_features_of_sd3_are_the_image_tokens_of_two_blocks() -> None:
    """Blocks 3 and 4 of six; each feature is the image stream after attention, normalised."""
    pipe = stable_diffusion_3()
    x_t, t, cond = random_input(pipe)
    entered: dict[int, Tensor] = {}
    for i, block in enumerate(pipe.transformer.transformer_blocks):
        block.norm2.register_forward_pre_hook(lambda module, args, i=i: entered.update({i: args[0]}))
    features = denoiser_of(pipe).features(x_t, t, cond)
    assert sorted(entered) == [0, 1, 2, 3, 4]
    assert cond["prompt_embeds"].shape[1] == 272  # text tokens; the image has 16
    for feature, stream in zip(features, (entered[3], entered[4]), strict=True):
        assert feature.shape == (2, 16, 16)
        torch.testing.assert_close(feature, torch.nn.functional.layer_norm(stream, (16,), eps=1e-6))


def test_lora_reaches_every_attention_projection(pipe: Any) -> None:
    family = family_of(pipe)
    network = copy.deepcopy(getattr(pipe, family.component))
    projections = {name for name, _ in network.named_modules() if name.rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v", "add_k_proj")}
    projections |= {name for name, _ in network.named_modules() if name.endswith("to_out.0")}
    inject_adapter_in_model(LoraConfig(r=2, target_modules=list(family.lora_targets)), network)
    adapted = {name.rsplit(".lora_A", 1)[0] for name, _ in network.named_parameters() if "lora_A" in name}
    assert projections and projections <= adapted
    unused = {target for target in family.lora_targets if not any(name.endswith("." + target) for name in adapted)}
    assert not unused


@torch.no_grad()
def test_conditions_can_be_encoded_apart_and_joined(pipe: Any) -> None:
    family, conditions = family_of(pipe), example_conditions(pipe, 3)
    if isinstance(conditions[0], str):
        conditions = ["", "short", "a prompt that is longer than the others and than the sixteen tokens of the encoders"]
    together = family.encode_conditions(pipe, conditions)
    apart = [family.encode_conditions(pipe, [condition]) for condition in conditions]
    for name, value in together.items():
        assert len(value) == 3 and not value.requires_grad
        torch.testing.assert_close(torch.cat([cond[name] for cond in apart]), value, rtol=1e-5, atol=1e-5)
    vector = family.condition_vector(getattr(pipe, family.component), together)
    assert vector.shape[0] == 3 and vector.ndim == 2 and vector.dtype == torch.float32
    assert not torch.equal(vector[0], vector[1])


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("timesteps", [(999.0, 749.0, 499.0, 249.0), (399.0,)])
def test_pipeline_call_visits_the_timesteps_without_guidance(name: str, timesteps: tuple[float, ...]) -> None:
    """On the schedulers that few-step students ship with; flow matching stores sigmas in float32, hence 1e-3 of 1000."""
    pipe = PIPELINES[name]()
    flow = isinstance(NoiseSchedule.from_scheduler(pipe.scheduler), RectifiedFlow)
    student = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None} if flow else {"original_inference_steps": 1000}
    pipe.scheduler = (FlowMatchEulerDiscreteScheduler if flow else LCMScheduler).from_config(pipe.scheduler.config, **student)
    calls, _ = record(pipe, **family_of(pipe).pipeline_call(timesteps, 1000))
    assert [len(call.x_t) for call in calls] == [2] * len(timesteps)
    visited = torch.stack([call.t[0].double() for call in calls])
    torch.testing.assert_close(visited, torch.tensor(timesteps, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("name", "resolution", "shape"), [("stable_diffusion", 32, (4, 16, 16)), ("stable_diffusion_3", 20, (4, 10, 10))])
@torch.no_grad()
def test_sample_shape_follows_the_resolution(name: str, resolution: int, shape: tuple[int, ...]) -> None:
    pipe = PIPELINES[name]()
    assert family_of(pipe).sample_shape(pipe, resolution) == shape
    latents = pipe("a", height=resolution, width=resolution, num_inference_steps=1, output_type="latent").images
    assert latents.shape == (1, *shape)


@pytest.mark.parametrize("name", TEXT)
def test_wrong_resolution_and_prompts_are_input_errors(name: str) -> None:
    pipe = PIPELINES[name]()
    family = family_of(pipe)
    with pytest.raises(InputError, match="resolution: got 17"):
        family.sample_shape(pipe, 17)
    with pytest.raises(InputError, match="resolution: got 0"):
        family.sample_shape(pipe, 0)
    for conditions, received in ((["a", 3], "3"), ("a", "'a'"), ([], r"\[\]")):
        with pytest.raises(InputError, match=f"prompt: got {received}"):
            family.encode_conditions(pipe, conditions)


def test_fractional_timesteps_of_a_unet_are_an_input_error() -> None:
    with pytest.raises(InputError, match="timesteps: got 499.5"):
        family_of(stable_diffusion()).pipeline_call((999.0, 499.5), 1000)


def test_unknown_pipeline_class_is_an_input_error() -> None:
    pipe = DDPMPipeline(class_conditional().unet, DDPMScheduler())
    with pytest.raises(InputError, match="pipeline class: got 'DDPMPipeline'.*StableDiffusionPipeline"):
        family_of(pipe)


def test_tiny_pipelines_are_small_and_the_same_every_time() -> None:
    for build in PIPELINES.values():
        networks = [getattr(pipe, family_of(pipe).component) for pipe in (build(), build())]
        first, second = (list(network.parameters()) for network in networks)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(parameter.any() for parameter in first)
        assert 17_000 <= sum(parameter.numel() for parameter in first) <= 300_000
