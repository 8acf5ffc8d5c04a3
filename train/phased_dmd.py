"""Distil a pipeline with phased DMD.

The exported pipeline must be able to switch between networks: the class-conditional one can, and a family says so for its own.
Digits, image-free, four steps, one CPU core (figures: docs/results.md):
    python train/digits_teacher.py --output_dir outputs/teacher-flow
    accelerate launch --cpu train/phased_dmd.py --config train/recipes/digits_phased_dmd.yaml --steps_per_phase 2 2 \
        --pretrained_model_name_or_path outputs/teacher-flow --trust_remote_code --output_dir outputs/phased-dmd-4step
"""

from diffusion_distill.cli import train
from diffusion_distill.config import run_cli

if __name__ == "__main__":
    run_cli(lambda: train("phased_dmd", description=__doc__))
