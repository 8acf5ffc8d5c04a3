"""Distil a pipeline with latent consistency distillation.

A student that takes the guidance scale as an input (the paper's; the network must be a UNet with `timestep_cond`) is the default:
    accelerate launch train/lcm.py --pretrained_model_name_or_path TEACHER --train_data_dir images/ --output_dir outputs/lcm
LCM-LoRA: one guidance scale for good, and the student itself as the target:
    accelerate launch train/lcm.py --pretrained_model_name_or_path TEACHER --train_data_dir images/ \
        --lora_rank 64 --guidance fixed --target_decay 0 --output_dir outputs/lcm-lora
Digits, one student for one, two and four steps, one CPU core (figures: docs/results.md):
    python train/digits_teacher.py --output_dir outputs/teacher-flow
    accelerate launch --cpu train/lcm.py --config train/recipes/digits_lcm.yaml \
        --pretrained_model_name_or_path outputs/teacher-flow --trust_remote_code --output_dir outputs/lcm-digits
"""

from diffusion_distill.cli import train
from diffusion_distill.config import run_cli

if __name__ == "__main__":
    run_cli(lambda: train("lcm", description=__doc__))
