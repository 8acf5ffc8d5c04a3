"""Encode prompts and images once, so that training steps run no text encoder and no VAE (--cache_dir).

Run the command again to continue one that was interrupted; nothing is encoded twice. Several processes share the shards:
    accelerate launch --num_processes 8 train/make_cache.py --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium \
        --train_data_dir images/ --output_dir outputs/cache-sd35
    accelerate launch --mixed_precision bf16 train/dmd2.py --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium \
        --cache_dir outputs/cache-sd35 ...
Digits: one CPU core, seconds; docs/memory.md has the size of a sample.
    python train/make_cache.py --pretrained_model_name_or_path outputs/teacher-flow --trust_remote_code --dataset digits \
        --output_dir outputs/cache-digits
"""

from diffusion_distill.build import load_pipeline
from diffusion_distill.cache_writer import CacheConfig, write_cache
from diffusion_distill.config import TeacherConfig, parse, run_cli
from diffusion_distill.data import DataConfig, build_dataset
from diffusion_distill.errors import InputError
from diffusion_distill.families import family_of
from diffusion_distill.preflight import check_input


def main() -> None:
    teacher, data, config = parse(None, TeacherConfig, DataConfig, CacheConfig, prog="make_cache.py", description=__doc__ or "")
    if data.cache_dir:
        raise InputError("cache_dir: it is encoded already; give the source of the data")
    images = config.encode_images and bool(data.train_data_dir or data.dataset)
    check_input(teacher, data, needs_images=images, needs_pairs=bool(data.pairs_dir))
    pipe = load_pipeline(teacher)
    family = family_of(pipe)
    channels, side = family.image_shape(pipe, data.resolution)
    size = {"channels": channels, "resolution": side, "num_classes": family.num_classes(pipe)}
    dataset = build_dataset(data, needs_images=images, needs_pairs=bool(data.pairs_dir), **size)
    named = {"teacher": teacher.pretrained_model_name_or_path, "resolution": data.resolution}
    write_cache(pipe, dataset, config, **named, num_workers=data.dataloader_num_workers)


if __name__ == "__main__":
    run_cli(main)
