"""Straighten a pipeline's trajectories: reflow on the teacher's own pairs.

Digits, one CPU core (figures: docs/results.md); train/reflow_distillation.py goes on from there:
    python train/digits_teacher.py --output_dir outputs/teacher-flow
    python train/make_pairs.py --pretrained_model_name_or_path outputs/teacher-flow --trust_remote_code --dataset digits \
        --num_pairs 10000 --num_inference_steps 16 --batch_size 250 --output_dir outputs/pairs-flow
    accelerate launch --cpu train/reflow.py --config train/recipes/digits_reflow.yaml --pairs_dir outputs/pairs-flow \
        --pretrained_model_name_or_path outputs/teacher-flow --trust_remote_code --output_dir outputs/reflow
Another round: draw the pairs of outputs/reflow/student, and train with that folder as --pretrained_model_name_or_path.
A smaller student (SlimFlow): --student_config '{"block_out_channels": [16, 32]}' --annealing cosine --annealing_steps 600
"""

from diffusion_distill.cli import train
from diffusion_distill.config import run_cli

if __name__ == "__main__":
    run_cli(lambda: train("reflow", description=__doc__))
