"""Distil a pipeline with trajectory consistency distillation.

Digits, one student for one, two and four steps: Frechet distance 2.816, .481 and .718 (the flow teacher's best is .511; one training
seed, 5,000 samples with each of two noise seeds), 127 CPU seconds on one core with that evaluation:
    python train/digits_teacher.py --output_dir outputs/teacher-flow
    accelerate launch --cpu train/tcd.py --config train/recipes/digits_tcd.yaml \
        --pretrained_model_name_or_path outputs/teacher-flow --trust_remote_code --output_dir outputs/tcd
"""

from diffusion_distill.cli import train
from diffusion_distill.config import run_cli

if __name__ == "__main__":
    run_cli(lambda: train("tcd", description=__doc__))
