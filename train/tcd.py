"""Distil a pipeline with trajectory consistency distillation.

Digits, one student for one, two and four steps, one CPU core (figures: docs/results.md):
    python train/digits_teacher.py --output_dir outputs/teacher-flow
    accelerate launch --cpu train/tcd.py --config train/recipes/digits_tcd.yaml \
        --pretrained_model_name_or_path outputs/teacher-flow --trust_remote_code --output_dir outputs/tcd
"""

from diffusion_distill.cli import train
from diffusion_distill.config import run_cli

if __name__ == "__main__":
    run_cli(lambda: train("tcd", description=__doc__))
