"""Distil a reflowed student into few steps, by regression on pairs.

Digits, one student for one, two and four steps, after the commands of train/reflow.py (figures: docs/results.md):
    accelerate launch --cpu train/reflow_distillation.py --config train/recipes/digits_reflow_distillation.yaml \
        --pairs_dir outputs/pairs-flow --pretrained_model_name_or_path outputs/reflow/student --trust_remote_code \
        --output_dir outputs/reflow-distilled
"""

from diffusion_distill.cli import train
from diffusion_distill.config import run_cli

if __name__ == "__main__":
    run_cli(lambda: train("reflow_distillation", description=__doc__))
