"""Distil a pipeline with consistency training or distillation (CM, iCT, ECT).

An EDM-sized run of easy consistency tuning (the paper's; not reproduced here) is the method's defaults, on 400,000 steps:
    accelerate launch train/consistency.py --pretrained_model_name_or_path TEACHER --train_data_dir images/ \
        --learning_rate 1e-4 --max_train_steps 400000 --train_batch_size 128 --output_dir outputs/ect
Distillation with the guided teacher instead of the data's own neighbours:
    accelerate launch train/consistency.py ... --neighbour distillation --discretization grid --guidance_scale 3
Digits, one student for one, two and four steps, one CPU core (figures: docs/results.md):
    python train/digits_teacher.py --output_dir outputs/teacher-flow
    accelerate launch --cpu train/consistency.py --config train/recipes/digits_consistency.yaml \
        --pretrained_model_name_or_path outputs/teacher-flow --trust_remote_code --output_dir outputs/consistency
"""

from diffusion_distill.cli import train
from diffusion_distill.config import run_cli

if __name__ == "__main__":
    run_cli(lambda: train("consistency", description=__doc__))
