"""Draw a teacher's pairs of noise and deterministic sample, for the methods that train on pairs (--pairs_dir).

The teacher may be any pipeline folder, a student's too: that is another round of reflow. Run the command again to continue one
that was interrupted; nothing is drawn twice and the result is the same to the bit. Several processes share the shards:
    accelerate launch --num_processes 8 train/make_pairs.py --prompts_file prompts.txt --num_pairs 50000 \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium --timestep_shift 3 --guidance_scale 4.5 \
        --mixed_precision bf16 --output_dir outputs/pairs-sd3
Digits: one CPU core, 43 CPU seconds.
    python train/make_pairs.py --pretrained_model_name_or_path outputs/teacher-flow --trust_remote_code --dataset digits \
        --num_pairs 5000 --num_inference_steps 25 --batch_size 250 --output_dir outputs/pairs-flow
"""

from diffusion_distill.build import load_pipeline
from diffusion_distill.config import TeacherConfig, parse, run_cli
from diffusion_distill.data import DataConfig, build_dataset
from diffusion_distill.families import family_of
from diffusion_distill.pair_writer import PairConfig, write_pairs
from diffusion_distill.preflight import check_input


def main() -> None:
    teacher, data, config = parse(None, TeacherConfig, DataConfig, PairConfig, prog="make_pairs.py", description=__doc__ or "")
    check_input(teacher, data)
    pipe = load_pipeline(teacher)
    family = family_of(pipe)
    channels, side = family.image_shape(pipe, data.resolution)
    dataset = build_dataset(data, needs_images=False, channels=channels, resolution=side, num_classes=family.num_classes(pipe))
    write_pairs(pipe, dataset.conditions, config, teacher=teacher.pretrained_model_name_or_path, resolution=data.resolution)


if __name__ == "__main__":
    run_cli(main)
