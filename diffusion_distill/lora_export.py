"""A student's LoRA adapter as a file that diffusers loads onto the untouched teacher: `pipe.load_lora_weights(folder)`."""

import inspect
from pathlib import Path
from typing import Any

from peft.utils import get_peft_model_state_dict

from .experts import Student, denoisers
from .families import Family

FOLDER = "lora"  # inside the exported folder


def save_lora(pipe: Any, student: Student, family: Family, folder: Path) -> bool:
    """Write the adapter of a one-network student into `folder`, in diffusers' layout with rank and alpha; whether there is any.

    False for a student without an adapter of its own, one of several networks, and pipelines that load none.
    """
    networks, save = denoisers(student), getattr(type(pipe), "save_lora_weights", None)
    layers, settings = f"{family.component}_lora_layers", f"{family.component}_lora_adapter_metadata"
    if len(networks) > 1 or not networks[0].adapter or save is None or layers not in inspect.signature(save).parameters:
        return False
    model: Any = networks[0].model
    name = networks[0].adapter
    weights = {key: value.detach().cpu().contiguous() for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}
    save(folder, **{layers: weights, settings: model.peft_config[name].to_dict()})
    return True
