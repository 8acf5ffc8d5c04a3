"""Distil a pipeline with DMD2.

SDXL, four steps (the paper's run on 64 GPUs; not reproduced here):
    accelerate launch --mixed_precision bf16 train/dmd2.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --train_data_dir images/ \
        --learning_rate 5e-7 --max_train_steps 19000 --train_batch_size 2 --output_dir outputs/sdxl-dmd2
Digits, one step, image-free, one CPU core (figures: docs/results.md); with real images: digits_dmd2_gan.yaml:
    python train/digits_teacher.py --output_dir outputs/teacher-flow
    accelerate launch --cpu train/dmd2.py --config train/recipes/digits_dmd2.yaml --num_inference_steps 1 \
        --pretrained_model_name_or_path outputs/teacher-flow --trust_remote_code --output_dir outputs/dmd2-1step
"""

from diffusion_distill.cli import train
from diffusion_distill.config import run_cli

if __name__ == "__main__":
    run_cli(lambda: train("dmd2", description=__doc__))
