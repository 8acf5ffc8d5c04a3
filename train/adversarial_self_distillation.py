"""Distil a pipeline with adversarial self-distillation: one student for every number of steps from 1 to N.

Digits, image-free, one student for 1 to 4 steps, one CPU core:
    python train/digits_teacher.py --output_dir outputs/teacher-flow
    accelerate launch --cpu train/adversarial_self_distillation.py --config train/recipes/digits_adversarial_self_distillation.yaml \
        --pretrained_model_name_or_path outputs/teacher-flow --trust_remote_code --output_dir outputs/asd
"""

from diffusion_distill.cli import train
from diffusion_distill.config import run_cli

if __name__ == "__main__":
    run_cli(lambda: train("adversarial_self_distillation", description=__doc__))
