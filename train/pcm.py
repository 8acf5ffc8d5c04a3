"""Distil a pipeline with phased consistency distillation."""

from diffusion_distill.cli import train
from diffusion_distill.config import run_cli

if __name__ == "__main__":
    run_cli(lambda: train("pcm", description=__doc__))
