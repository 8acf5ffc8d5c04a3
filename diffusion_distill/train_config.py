"""Settings of the training loop. Names follow diffusers' training scripts."""

import math
from dataclasses import dataclass
from typing import Literal

from .errors import InputError, reject


@dataclass
class TrainConfig:
    output_dir: str = "outputs/run"
    """Folder of the run: run.json, metrics.jsonl, samples/, checkpoint-N/, student/."""
    seed: int = 0
    """Every random number of the run derives from it."""
    max_train_steps: int = 1000
    """Optimizer steps, counted in turns of the fastest network (the fake score, where there is one)."""
    train_batch_size: int = 4
    """Samples per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 1e-5
    """Peak learning rate of the student, and of every network that the method gives none of its own."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = (
        "constant_with_warmup"
    )
    """Learning-rate schedule over `max_train_steps`, as diffusers defines it."""
    lr_warmup_steps: int = 0
    """Steps of linear warm-up."""
    lr_num_cycles: int = 1
    """Hard restarts of `cosine_with_restarts`."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps the moments in eight bits, by bitsandbytes: a quarter of the memory. It rounds, so results differ."""
    adam_beta1: float = 0.9
    """AdamW: decay of the first moment."""
    adam_beta2: float = 0.999
    """AdamW: decay of the second moment."""
    adam_weight_decay: float = 1e-2
    """AdamW: weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW: added to the denominator."""
    max_grad_norm: float = 10.0
    """Largest gradient norm of each network; larger ones are scaled down."""
    ema_decay: float = 0.0
    """Decay of the student's moving average (float32), which is then what is sampled and exported. 0: none."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """bf16 runs networks under autocast and keeps the frozen teacher in bfloat16. None: as `accelerate launch` says."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    offload_encoders: bool = False
    """Text encoders and VAE wait in the CPU's memory while they are not called: with `cache_dir`, all the time but for sample grids."""
    offload_idle_roles: bool = False
    """Networks that a turn neither trains nor calls wait in the CPU's memory, with their optimizers' states. Each way costs a copy."""
    attention_backend: str | None = None
    """Attention kernel of all networks while they train, by diffusers' name: native, _native_flash, flex, xformers, flash, ... None: the
    one that diffusers takes of itself. What a network cannot run with is refused before the run begins."""
    batch_guidance: bool = True
    """Guide the teacher in one call of twice the batch in place of two calls: never slower where measured (docs/decisions.md). False
    halves the memory of that call."""
    lora_rank: int = 0
    """Rank of the LoRA adapter that trains in place of the weights. 0: full training."""
    lora_alpha: int | None = None
    """Scale of the LoRA adapter. None: the rank."""
    sharing: Literal["full", "shared"] = "full"
    """With LoRA: `full` gives each trained network a frozen copy of the weights; with `shared` all are adapters on the teacher's own."""
    parallelism: Literal["replicate", "shard"] = "replicate"
    """Several processes: `replicate` holds every network on each; `shard` spreads weights, gradients and optimizer states over them."""
    checkpointing_steps: int = 500
    """Steps between two checkpoints; 0 writes one at the end only."""
    checkpoints_total_limit: int | None = None
    """Newest checkpoints to keep. None: all."""
    resume_from_checkpoint: str | None = None
    """`latest`, or the path of a checkpoint."""
    rank_timeout: float = 1800.0
    """Seconds to wait for a rank that does not come; then the run ends and names it. Sampling and export happen on one rank alone."""
    logging_steps: int = 10
    """Steps between two lines of metrics.jsonl."""
    validation_steps: int = 0
    """Steps between two sample grids at fixed noise; 0: at the end only."""
    num_validation_images: int = 16
    """Images in a sample grid."""
    validation_prompts: tuple[str, ...] = ()
    """Prompts (or class labels) of the sample grids. Empty: the first of the data set."""
    report_to: str = ""
    """Trackers besides metrics.jsonl, comma-separated: tensorboard, wandb, trackio, or any other that accelerate knows."""
    tracker_project_name: str = "diffusion-distill"
    """Project name in the tracker."""
    push_to_hub: bool = False
    """Upload the exported student."""
    hub_model_id: str | None = None
    """Repository to upload to. None: the name of `output_dir`."""

    def __post_init__(self) -> None:
        self.validation_prompts = tuple(self.validation_prompts)
        if self.mixed_precision == "fp16":
            raise InputError(FP16_REFUSED)
        at_least = {"max_train_steps": 1, "train_batch_size": 1, "gradient_accumulation_steps": 1, "logging_steps": 1, "lr_num_cycles": 1}
        at_least |= {"lora_rank": 0, "checkpointing_steps": 0, "validation_steps": 0, "num_validation_images": 1, "lr_warmup_steps": 0}
        for name, minimum in at_least.items():
            if getattr(self, name) < minimum:
                raise reject(name, getattr(self, name), f"{minimum} or more")
        for name in ("learning_rate", "adam_epsilon", "rank_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise reject(name, getattr(self, name), "a number above 0")
        if not self.max_grad_norm > 0:  # infinite: never scaled down
            raise reject("max_grad_norm", self.max_grad_norm, "a number above 0")
        if not 0 <= self.adam_weight_decay < math.inf:
            raise reject("adam_weight_decay", self.adam_weight_decay, "0 or more")
        for name, none in (("ema_decay", "0 (none)"), ("adam_beta1", "0"), ("adam_beta2", "0")):
            if not 0 <= getattr(self, name) < 1:
                raise reject(name, getattr(self, name), f"{none} or a decay below 1")
        if self.offload_idle_roles and self.parallelism == "shard":
            raise reject("offload_idle_roles", True, "false with parallelism 'shard': its weights move between ranks")
        if self.optimizer == "adamw_8bit" and self.parallelism == "shard":
            raise reject("optimizer", "adamw_8bit", "'adamw' with parallelism 'shard', which spreads the moments already")
        if self.sharing == "shared" and not self.lora_rank:
            raise reject(
                "lora_rank", self.lora_rank, "1 or more with sharing 'shared': one copy of the weights cannot be trained in two ways"
            )
        for name in ("lora_alpha", "checkpoints_total_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise reject(name, getattr(self, name), "1 or more, or none")


FP16_REFUSED = (
    "mixed_precision: got 'fp16'; use bf16 or no: fp16 needs a loss scale for each network, and accelerate shares one among all optimizers"
)
