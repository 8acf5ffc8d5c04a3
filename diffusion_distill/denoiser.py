"""A diffusers model with what is needed to read it: its schedule, its prediction type, its family."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .adapters import switched_on
from .families import Cond, Family
from .prediction import Prediction
from .schedule import NoiseSchedule, expand_dims


class _AllTapped(Exception):
    """Ends a forward pass once every tapped module has run."""


class Denoiser(nn.Module):
    """`denoiser(x_t, t, cond)` is a `Prediction`, whatever the network underneath predicts.

    Conversions run in float32 (float64 for float64 input); the network runs in its own dtype, or under autocast to
    `autocast_dtype`. Each call enters autocast anew: a cast of the weights cached under `no_grad` would cut the gradient of
    a later call. `adapter` names the LoRA adapter of a shared `model` (adapters.py) that works during a call of this denoiser.
    With `batch_guidance`, `guided` calls it once with twice the batch.
    """

    batch_guidance = False

    def __init__(
        self,
        model: nn.Module,
        schedule: NoiseSchedule,
        prediction_type: str,
        family: Family,
        autocast_dtype: torch.dtype | None = None,
        adapter: str | None = None,
    ):
        super().__init__()
        self.model, self.schedule, self.prediction_type, self.family = model, schedule, prediction_type, family
        self.autocast_dtype, self.adapter = autocast_dtype, adapter

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """Prediction at x_t (B, ...) and t (B,)."""
        x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        output = self._run(x_t, t, cond).to(x_t.dtype)
        alpha, sigma = expand_dims(self.schedule.alpha(t), x_t), expand_dims(self.schedule.sigma(t), x_t)
        return Prediction.from_output(output, self.prediction_type, x_t, alpha, sigma, self.schedule.sigma_data)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """Outputs of the family's tapped modules; the rest of the network is not run."""
        taps, found = self.family.taps(self.model), []

        def tap(module: nn.Module, args: object, output: object) -> None:
            found.append(self.family.feature(output, x_t))
            if len(found) == len(taps):
                raise _AllTapped

        handles = [module.register_forward_hook(tap) for module in taps]
        try:
            self._run(x_t, t, cond)
        except _AllTapped:
            self._pass_ended()
            return found
        finally:
            for handle in handles:
                handle.remove()
        raise RuntimeError(f"family {self.family.name!r}: the network ran {len(found)} of its {len(taps)} tapped modules")

    def _run(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        cond = {k: v.to(dtype) if v.is_floating_point() else v for k, v in cond.items()}
        autocast = torch.autocast(x_t.device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext()
        with autocast, switched_on(self.model, self.adapter):
            output = self.family.call(self.model, x_t.to(dtype), t, cond)
        if not torch.is_grad_enabled():
            self._pass_ended()
        return output

    def _pass_ended(self) -> None:
        """A model that is spread over ranks waits for the end of its pass, and keeps a list of passes for the backward one."""
        if isinstance(self.model, FSDPModule):
            self.model.reset_iter_state()


def guided(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, scale: float | Tensor) -> Prediction:
    """Classifier-free guidance uncond + scale (cond - uncond) (arXiv:2207.12598, eq. 6 with scale = 1 + w); 1 is off.

    `scale` is a number, or one for each sample, (B,).
    """
    if not isinstance(scale, Tensor) and scale == 1:
        return denoiser(x_t, t, cond)
    pred, unguided = _both(denoiser, x_t, t, cond, uncond)
    return unguided.interpolate(pred, expand_dims(scale, x_t) if isinstance(scale, Tensor) else scale)


def _both(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond) -> tuple[Prediction, Prediction]:
    """The predictions under two conditions; those of unlike shapes cannot share a batch."""
    alike = {k: v.shape for k, v in cond.items()} == {k: v.shape for k, v in uncond.items()}
    if not (denoiser.batch_guidance and alike):
        return denoiser(x_t, t, cond), denoiser(x_t, t, uncond)
    both: Prediction = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), {k: torch.cat([cond[k], uncond[k]]) for k in cond})
    halves = zip(*(value.chunk(2) for value in (both.x0, both.eps, both.alpha, both.sigma)), strict=True)
    first, second = (Prediction(x0, eps, alpha, sigma, both.sigma_data) for x0, eps, alpha, sigma in halves)
    return first, second
