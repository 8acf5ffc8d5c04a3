"""Distil a pipeline with phased DMD.

The exported pipeline must be able to switch between networks: the class-conditional one can, and a family says so for its own.
Digits, image-free, one CPU core, 700 training steps, one seed, two noise seeds; Frechet distance (the teacher's best: flow .511,
v-prediction .519), recall and within-class spread: two steps .420, .944, 1.26 in 173 CPU seconds (v-prediction teacher .429, .942, 1.26),
four steps .323, .947, 1.25 in 200:
    python train/digits_teacher.py --output_dir outputs/teacher-flow
    accelerate launch --cpu train/phased_dmd.py --config train/recipes/digits_phased_dmd.yaml --steps_per_phase 2 2 \
        --pretrained_model_name_or_path outputs/teacher-flow --trust_remote_code --output_dir outputs/phased-dmd-4step
"""

from diffusion_distill.cli import train
from diffusion_distill.config import run_cli

if __name__ == "__main__":
    run_cli(lambda: train("phased_dmd", description=__doc__))
