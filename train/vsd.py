"""Distil a pipeline with VSD into one step (SwiftBrush).

Stable Diffusion 2.1 (the paper's run on 4 A100; not reproduced here):
    accelerate launch --mixed_precision bf16 train/vsd.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-2-1-base --prompts_file prompts.txt --guidance_scale 4.5 \
        --learning_rate 1e-6 --max_train_steps 65000 --train_batch_size 16 --output_dir outputs/sd-vsd
Digits, one CPU core (figures: docs/results.md):
    python train/digits_teacher.py --output_dir outputs/teacher-flow
    accelerate launch --cpu train/vsd.py --config train/recipes/digits_vsd.yaml \
        --pretrained_model_name_or_path outputs/teacher-flow --trust_remote_code --output_dir outputs/vsd
"""

from diffusion_distill.cli import train
from diffusion_distill.config import run_cli

if __name__ == "__main__":
    run_cli(lambda: train("vsd", description=__doc__))
