"""Distil a pipeline with DMD.

Stable Diffusion 1.5, one step, guidance 3 (the paper's model; its run is not reproduced here):
    accelerate launch train/make_pairs.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --prompts_file prompts.txt --guidance_scale 3 --num_pairs 500000 --mixed_precision bf16 --output_dir outputs/pairs-sd15
    accelerate launch --mixed_precision bf16 train/dmd.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --pairs_dir outputs/pairs-sd15 --guidance_scale 3 --learning_rate 1e-5 --train_batch_size 8 --output_dir outputs/sd15-dmd
Digits, one step:
    python train/digits_teacher.py --output_dir outputs/teacher-flow
    python train/make_pairs.py --pretrained_model_name_or_path outputs/teacher-flow --trust_remote_code --dataset digits \
        --num_pairs 5000 --num_inference_steps 25 --batch_size 250 --output_dir outputs/pairs-flow
    accelerate launch --cpu train/dmd.py --config train/recipes/digits_dmd.yaml --pairs_dir outputs/pairs-flow \
        --pretrained_model_name_or_path outputs/teacher-flow --trust_remote_code --output_dir outputs/dmd
"""

from diffusion_distill.cli import train
from diffusion_distill.config import run_cli

if __name__ == "__main__":
    run_cli(lambda: train("dmd", description=__doc__))
