"""Distil a pipeline with continuous-time consistency models (sCM).

Digits, one student for one, two and four steps; settings to start from (figures: docs/results.md):
    python train/digits_teacher.py --output_dir outputs/teacher-flow
    accelerate launch --cpu train/scm.py --config train/recipes/digits_scm.yaml \
        --pretrained_model_name_or_path outputs/teacher-flow --trust_remote_code --output_dir outputs/scm
"""

from diffusion_distill.cli import train
from diffusion_distill.config import run_cli

if __name__ == "__main__":
    run_cli(lambda: train("scm", description=__doc__))
