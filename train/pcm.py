"""Distil a pipeline with phased consistency distillation.

Digits, four phases without the discriminator, one CPU core (figures: docs/results.md):
    python train/digits_teacher.py --output_dir outputs/teacher-flow
    accelerate launch --cpu train/pcm.py --config train/recipes/digits_pcm.yaml --phases 4 \
        --pretrained_model_name_or_path outputs/teacher-flow --trust_remote_code --output_dir outputs/pcm-4
"""

from diffusion_distill.cli import train
from diffusion_distill.config import run_cli

if __name__ == "__main__":
    run_cli(lambda: train("pcm", description=__doc__))
