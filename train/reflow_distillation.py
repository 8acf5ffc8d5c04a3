"""Distil a reflowed student into few steps, by regression on pairs.

Digits, one CPU core, 113 CPU seconds after the commands of train/reflow.py (255 with them). Frechet distance .638 at one step, .551 at
two, .530 at four, by the same student (one seed; the teacher's best is .511):
    accelerate launch --cpu train/reflow_distillation.py --config train/recipes/digits_reflow_distillation.yaml \
        --pairs_dir outputs/pairs-flow --pretrained_model_name_or_path outputs/reflow/student --trust_remote_code \
        --output_dir outputs/reflow-distilled
"""

from diffusion_distill.cli import train
from diffusion_distill.config import run_cli

if __name__ == "__main__":
    run_cli(lambda: train("reflow_distillation", description=__doc__))
