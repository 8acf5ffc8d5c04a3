"""The training loop: what it moves, what it writes, and that stopping, splitting and spreading it change nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import class_conditional

from diffusion_distill import DMD2, InputError, NonFiniteError, TrainConfig, Trainer
from diffusion_distill.data import DataConfig, build_dataset
from diffusion_distill.denoiser import Denoiser
from diffusion_distill.methods import ASD, DMD, LCM, PCM, SCM, TCD, VSD, Consistency, Method, PhasedDMD, Reflow, ReflowDistillation

PROCESSES = ("flow", "v_prediction", "epsilon")
IMAGE_FREE = DMD2(num_inference_steps=2, guidance_scale=1.0, gan_weight=0.0, student_update_interval=2)
GAN = DMD2(num_inference_steps=2, guidance_scale=2.0, gan_weight=0.1, student_update_interval=2, discriminator="fake_score")
PHASED = PhasedDMD((1, 1), timestep_shift=1.0, experts="full", guidance_scale=1.0, phase_steps=3, student_update_interval=2)
JOINT = PhasedDMD((1, 1), timestep_shift=1.0, training="joint", expert_rank=2, guidance_scale=2.0, student_update_interval=2)
REGRESSED = DMD(guidance_scale=2.0, regression_distance="teacher_features")
EASY = Consistency(stages=2, stage_steps=3)
CONSISTENT = Consistency((1, 2), neighbour="distillation", discretization="grid", guidance_scale=2.0, target="follower", target_decay=0.8)
ANNEALED = Reflow(time_law="u_shaped", annealing="linear", annealing_steps=4)
DISTILLED = ReflowDistillation((1, 2), inputs="student", two_step_weight=1.0)
LATENT = LCM((2, 1), guidance="fixed", guidance_scale=2.0, solver_intervals=20, stages=2, stage_steps=3, target_decay=0.8)
PIECEWISE = PCM(2, solver_intervals=20, guidance_scale=2.0, target_decay=0.8, discriminator="own", discriminator_learning_rate=None)
TRAJECTORY = TCD((2, 1), gamma=1.0, segments=(2, 1), stage_steps=3, solver_intervals=20, guidance_scale=2.0)
ADAPTED = VSD(guidance_scale=2.0, fake_score_rank=2, fake_score_alpha=4, unconditional_share=0.3)
CONTINUOUS = SCM((1, 2), warmup_steps=4)
DIFFERENCED = SCM((1, 2), derivative="backward", difference_step=0.05, velocity="data", warmup_steps=4, adaptive_weighting=False)
SELF = ASD(3, guidance_scale=2.0, student_update_interval=2, discriminator="fake_score", gan_weight=0.5, penalty_weight=0.0)
METHODS: dict[str, Method] = {
    "self": SELF,
    "scm": CONTINUOUS,
    "scm_difference": DIFFERENCED,
    "vsd": ADAPTED,
    "lcm": LATENT,
    "pcm": PIECEWISE,
    "tcd": TRAJECTORY,
    "image_free": IMAGE_FREE,
    "gan": GAN,
    "phased": PHASED,
    "phased_joint": JOINT,
    "dmd": REGRESSED,
    "easy": EASY,
    "consistency": CONSISTENT,
    "reflow": ANNEALED,
    "distilled": DISTILLED,
}
NOISE = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
PAIRS = [{"condition": i % 10, "noise": x, "x0": x.tanh()} for i, x in enumerate(NOISE)]


def config(folder: Path, **changes: object) -> TrainConfig:
    start = TrainConfig(output_dir=str(folder), train_batch_size=8, max_train_steps=6, learning_rate=1e-3, ema_decay=0.9, logging_steps=2)
    return replace(start, **({"checkpointing_steps": 3, "num_validation_images": 4} | changes))  # type: ignore[arg-type]


def trainer(folder: Path, method: Method = IMAGE_FREE, process: str = "flow", **changes: object) -> Trainer:
    data: Any = build_dataset(DataConfig(dataset="digits"), needs_images=method.needs_images, channels=1, resolution=8)
    return Trainer(class_conditional(process), replace(method), config(folder, **changes), PAIRS if method.needs_pairs else data)


def final_weights(folder: Path, step: int = 6) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted((folder / f"checkpoint-{step}").glob("*.safetensors"))}


def assert_equal(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys() and len(a) >= 3
    for file in a:
        for name, value in a[file].items():
            torch.testing.assert_close(b[file][name], value, rtol=tolerance, atol=tolerance, msg=lambda m: f"{file} {name}: {m}")  # noqa: B023


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_moves_exactly_the_roles_of_its_turns(tmp_path: Path, name: str, process: str) -> None:
    run = trainer(tmp_path, METHODS[name], process)
    roles, shared = ("teacher", *run.trained), {id(p) for role in run.trained for p in run.nets.parameters(role).values()}

    def weights(role: str) -> list[torch.Tensor]:
        """An adapter's own; the teacher's are those that no other role trains in it."""
        whole = getattr(run.nets, role)
        own = [p for p in whole.parameters() if id(p) not in shared] if role == "teacher" else list(whole.parameters())
        return list(run.nets.parameters(role).values()) if getattr(whole, "adapter", None) else own

    for step in range(2):
        moved = {role for turn_roles, _ in run.method.updates(step) for role in turn_roles}
        before = {role: [p.clone() for p in weights(role)] for role in roles}
        raw = next(run._data())
        run.train_step(run._prepare(raw))
        after = {role: weights(role) for role in roles}
        changed = {role for role in roles if any(not torch.equal(a, b) for a, b in zip(before[role], after[role], strict=True))}
        assert changed == moved
        assert all(p.grad is None and not p.requires_grad for role in roles for p in after[role])


@pytest.mark.parametrize("name", METHODS)
def test_predictions_of_frozen_networks_record_no_graph(tmp_path: Path, name: str) -> None:
    """A loss is differentiated through frozen features of a discriminator or a distance at most, and through no prediction."""
    run = trainer(tmp_path, METHODS[name])
    recorded: list[tuple[str, bool, bool]] = []

    def note(role: str, prediction: Any) -> None:
        trains = role in run.trained and any(p.requires_grad for p in run.nets.parameters(role).values())
        recorded.append((role, trains, prediction.x0.requires_grad))

    for role in run.nets:
        if isinstance(net := getattr(run.nets, role), Denoiser):
            net.register_forward_hook(lambda module, args, prediction, role=role: note(role, prediction))
    run.train_step(run._prepare(next(run._data())))
    assert any(graph for _, _, graph in recorded)
    assert not [role for role, trains, graph in recorded if graph and not trains]


def test_lora_moves_the_adapter_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_train_steps=1, lora_rank=2, checkpointing_steps=0)
    names = run.nets.parameters("student").keys()
    assert names and all("lora_" in name for name in names)
    before = {name: p.clone() for name, p in run.nets.student.named_parameters()}
    run.train()
    changed = {name for name, p in run.nets.student.named_parameters() if not torch.equal(p, before[name])}
    assert changed and changed <= set(names)


def test_a_run_leaves_its_record_its_metrics_and_its_pictures(tmp_path: Path) -> None:
    run = trainer(tmp_path, report_to="tensorboard", validation_steps=3)
    run.train()
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["method"] == "DMD2" and record["settings"]["learning_rate"] == 1e-3 and record["packages"]["torch"]
    (sampler,) = record["samplers"]
    assert sampler["timesteps"] == [1000.0, 500.0] and sampler["kind"] == "sde" and sampler["guidance_scale"] == 1.0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert {"student/loss", "student/gap", "fake_score/denoising", "student/grad_norm", "lr/student"} <= lines[-1].keys()
    assert {p.name for p in (tmp_path / "samples").iterdir()} == {"teacher.png", "step_000003.png", "step_000006.png"}
    assert list(tmp_path.rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    "changes", [{}, {"lora_rank": 2}, {"lr_scheduler": "cosine", "lr_warmup_steps": 2}], ids=["full", "lora", "cosine"]
)
@pytest.mark.parametrize("name", METHODS)
def test_resuming_is_bit_exact(tmp_path: Path, name: str, changes: dict[str, object]) -> None:
    trainer(tmp_path / "whole", METHODS[name], **changes).train()
    first = trainer(tmp_path / "parts", METHODS[name], **changes)
    micro_batches = first._data()
    for _ in range(3):
        first.train_step(first._prepare(next(micro_batches)))
    first.save()
    second = trainer(tmp_path / "parts", METHODS[name], resume_from_checkpoint="latest", **changes)
    assert second.step == 3
    second.train()
    assert_equal(final_weights(tmp_path / "whole"), final_weights(tmp_path / "parts"))


ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}


def in_a_process(folder: Path, **changes: object) -> list[str]:
    return [__file__, str(folder), json.dumps(changes)]


def test_a_killed_run_resumes_bit_exactly(tmp_path: Path) -> None:
    changes = {"max_train_steps": 24, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
    subprocess.run([sys.executable, *in_a_process(tmp_path / "whole", **changes)], check=True, capture_output=True, env=ENVIRONMENT)
    killed = [sys.executable, *in_a_process(tmp_path / "parts", **changes)]
    process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "parts").glob("checkpoint-1?")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = [sys.executable, *in_a_process(tmp_path / "parts", resume_from_checkpoint="latest", **changes)]
    subprocess.run(resumed, check=True, capture_output=True, env=ENVIRONMENT)
    assert_equal(final_weights(tmp_path / "whole", 24), final_weights(tmp_path / "parts", 24))
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def assert_same_up_to_rounding(one: Path, two: Path, step: int) -> None:
    """Weights differ by at most 1 % of how far training moved them, in the norm; Adam turns the rounding of vanishing gradients into steps.

    Biases of attention keys are left out: the softmax does not see them, so their gradient is nothing but rounding.
    """
    first, second = final_weights(one, step), final_weights(two, step)
    start = {f"model.{name}": p.detach() for name, p in class_conditional("flow").unet.named_parameters()}
    files = [name for name in first if "optimizer" not in name]
    moved = max(norm_of(first[file][key] - p for key, p in start.items() if key in first[file]) for file in files)
    for file in files:
        different = norm_of(value - second[file][key] for key, value in first[file].items() if not key.endswith("to_k.bias"))
        assert different < 0.01 * moved, (file, different, moved)


def norm_of(tensors: Iterable[torch.Tensor]) -> float:
    """Of all of them together."""
    return math.sqrt(sum(tensor.square().sum().item() for tensor in tensors))


@pytest.mark.parametrize("name", METHODS)
def test_accumulation_equals_one_large_batch(tmp_path: Path, name: str) -> None:
    trainer(tmp_path / "one", METHODS[name]).train()
    trainer(tmp_path / "two", METHODS[name], train_batch_size=4, gradient_accumulation_steps=2).train()
    assert_same_up_to_rounding(tmp_path / "one", tmp_path / "two", 6)


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    subprocess.run([sys.executable, *in_a_process(tmp_path / "one")], check=True, capture_output=True, env=ENVIRONMENT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # on a port that is free
    two = subprocess.run([*launch, *in_a_process(tmp_path / "two", train_batch_size=4)], capture_output=True, text=True, env=ENVIRONMENT)
    assert two.returncode == 0, two.stderr[-3000:]
    assert json.loads((tmp_path / "one" / "run.json").read_text())["world_size"] == 1
    assert json.loads((tmp_path / "two" / "run.json").read_text())["world_size"] == 2
    assert_same_up_to_rounding(tmp_path / "one", tmp_path / "two", 6)


def test_a_gradient_that_is_no_number_stops_before_the_step(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    with torch.no_grad():
        next(run.nets.fake_score.parameters()).fill_(float("nan"))
    before = [p.clone() for p in run.nets.student.parameters()]
    with pytest.raises(NonFiniteError, match=r"step 0.*'student'"):
        run.train()
    assert all(torch.equal(a, b) for a, b in zip(before, run.nets.student.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"mixed_precision": "fp16"}, "mixed_precision"),
        ({"max_train_steps": 0}, "max_train_steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"resume_from_checkpoint": "latest"}, "resume_from_checkpoint"),
        ({"report_to": "nonsense"}, "report_to"),
    ],
)
def test_wrong_settings_name_themselves(tmp_path: Path, changes: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=field):
        trainer(tmp_path, **changes)


def test_timesteps_outside_the_schedule_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"timesteps.*1500.*0 to 1000"):
        trainer(tmp_path, replace(IMAGE_FREE, timesteps=(1500.0,)))
    assert not (tmp_path / "run.json").exists()


def test_another_run_is_not_overwritten_nor_resumed_with_other_settings(tmp_path: Path) -> None:
    trainer(tmp_path, max_train_steps=1).train()
    kept = (tmp_path / "run.json").read_bytes()
    with pytest.raises(InputError, match=r"output_dir.*already holds a run"):
        trainer(tmp_path, max_train_steps=1)
    with pytest.raises(InputError, match=r"learning_rate: stored 0.001, now 0.5"):
        trainer(tmp_path, max_train_steps=1, learning_rate=0.5, resume_from_checkpoint="latest")
    assert (tmp_path / "run.json").read_bytes() == kept


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    trainer(tmp_path / "plain", max_train_steps=2).train()
    trainer(tmp_path / "recomputed", max_train_steps=2, gradient_checkpointing=True).train()
    assert_equal(final_weights(tmp_path / "plain", 2), final_weights(tmp_path / "recomputed", 2), tolerance=1e-6)


def test_bf16_trains_and_keeps_float32_weights(tmp_path: Path) -> None:
    run = trainer(tmp_path, GAN, max_train_steps=2, mixed_precision="bf16")
    start = {name: p.clone() for name, p in run.nets.student.named_parameters()}
    run.train()
    assert next(run.nets.teacher.parameters()).dtype == torch.bfloat16
    moved = [name for name, p in run.nets.student.named_parameters() if not torch.equal(p, start[name])]
    assert len(moved) > 0.9 * len(start)  # a weight cast cached without gradient would leave the student where it was
    assert all(p.dtype == torch.float32 for p in run.nets.student.parameters())


if __name__ == "__main__":  # one run in a process of its own, for the tests that kill it or spread it over ranks
    torch.set_num_threads(1)
    trainer(Path(sys.argv[1]), **json.loads(sys.argv[2])).train()


def test_processes_that_accelerate_would_run_one_by_one_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="number of processes: got 2; accelerate sees 1; on CPUs, set ACCELERATE_USE_CPU=true"):
        trainer(tmp_path)


def test_an_adapter_on_a_smaller_random_student_is_refused(tmp_path: Path) -> None:
    smaller = Reflow(student_config='{"block_out_channels": [4, 8]}')
    with pytest.raises(InputError, match="lora_rank: got 2; 0 for a student that is another network than the teacher's"):
        trainer(tmp_path, smaller, lora_rank=2)
    trainer(tmp_path, smaller)
