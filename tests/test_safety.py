"""Nothing from outside runs, escapes its folder, or finds its way into what is published; nothing secret is written."""

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import trainer
from tiny_pipelines import class_conditional, stable_diffusion

from diffusion_distill.build import load_pipeline
from diffusion_distill.config import TeacherConfig, run_cli
from diffusion_distill.errors import InputError, reject
from diffusion_distill.model_card import model_card, usage
from diffusion_distill.redaction import HIDDEN, redacted

ROOT = Path(__file__).parents[1]
SOURCES = [path for part in ("diffusion_distill", "train", "eval", "benchmarks", "pipelines") for path in (ROOT / part).rglob("*.py")]
PICKLING = {"cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas"}
CALLS = {"eval", "exec", "torch.save", "torch.jit.load", "yaml.unsafe_load", "yaml.full_load"}
METHODS = {
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
}  # of torch.distributed: pickles on the wire

# ---------------------------------------------------------------------- no pickle


def dangers(source: str, weights_only: bool = False) -> Iterator[str]:
    """Imports and calls that read or write pickles, or run text as code.

    With `weights_only`, torch's restricted reader will do, for weights that their authors publish in no other form.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from {alias.name.split(".")[0] for alias in node.names} & PICKLING
        elif isinstance(node, ast.ImportFrom):
            yield from {(node.module or "").split(".")[0]} & (PICKLING | {"pickle"})
        elif isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            restricted = weights_only and keywords.get("weights_only") == "True"
            if name in CALLS or name.split(".")[-1] in METHODS or name.startswith("pickle.") or (name == "torch.load" and not restricted):
                yield name
            if keywords.get("allow_pickle", "False") != "False":
                yield "allow_pickle"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_is_read_or_written(path: Path) -> None:
    assert not list(dangers(path.read_text(), weights_only=path.relative_to(ROOT).parts[0] == "eval"))


@pytest.mark.parametrize(
    "source",
    [
        "x = pickle.loads(data)",
        "from pickle import loads",
        "def f():\n    import joblib.memory",
        "torch.save({}, path)",
        "x = torch.load(path)",
        "x = torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "dist.all_gather_object(out, x)",
        "eval(text)",
    ],
)
def test_the_search_finds_what_it_searches(source: str) -> None:
    assert list(dangers(source))
    assert bool(list(dangers(source, weights_only=True))) == ("weights_only=True" not in source)


def test_a_run_writes_safetensors_json_and_pictures_alone(tmp_path: Path) -> None:
    trainer(tmp_path, max_train_steps=1, num_validation_images=1).train()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in written} == {".safetensors", ".json", ".jsonl", ".png"}
    assert not [path for path in written if path.read_bytes()[:2] in (b"PK", b"\x80\x04", b"\x80\x02")]


class Touch:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_bin_weights_are_refused_unless_asked_for_and_run_nothing_even_then(tmp_path: Path) -> None:
    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path / "teacher")
    weights = tmp_path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save(pipe.unet.state_dict(), weights.with_suffix(".bin"))
    with pytest.raises(InputError, match=r"cannot load .*diffusion_pytorch_model\.safetensors.*--allow_bin_weights"):
        load_pipeline(TeacherConfig(str(tmp_path / "teacher")))
    loaded = load_pipeline(TeacherConfig(str(tmp_path / "teacher"), allow_bin_weights=True)).unet.state_dict()
    assert all(value.equal(loaded[name]) for name, value in pipe.unet.state_dict().items())
    torch.save({"weight": Touch(tmp_path / "touched")}, weights.with_suffix(".bin"))
    with pytest.raises(InputError, match="cannot load"):
        load_pipeline(TeacherConfig(str(tmp_path / "teacher"), allow_bin_weights=True))
    assert not (tmp_path / "touched").exists()


# ---------------------------------------------------------------------- code of a folder


def test_code_of_a_folder_runs_by_explicit_flag_alone(tmp_path: Path) -> None:
    class_conditional().save_pretrained(tmp_path / "teacher")
    code = tmp_path / "teacher" / "pipeline.py"
    code.write_text(f"import os\nos.makedirs({str(tmp_path / 'touched')!r}, exist_ok=True)\n" + code.read_text())
    with pytest.raises(InputError, match="trust_remote_code"):
        load_pipeline(TeacherConfig(str(tmp_path / "teacher")))
    assert not (tmp_path / "touched").exists()
    load_pipeline(TeacherConfig(str(tmp_path / "teacher"), trust_remote_code=True))
    assert (tmp_path / "touched").exists()


# ---------------------------------------------------------------------- secrets

TOKEN = "hf_" + "aB3" * 11
PASSWORD = "correct-horse-battery"


def test_secrets_are_replaced_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", PASSWORD)
    monkeypatch.setenv("MONKEY", "the word monkey")  # not named like a secret
    given = {"a": [f"x {TOKEN} y", (PASSWORD,)], PASSWORD: 1.5, "url": "https://me:pw@host/path", "kept": "the word monkey, hf_short"}
    assert redacted(given) == {
        "a": [f"x {HIDDEN} y", (HIDDEN,)],
        HIDDEN: 1.5,
        "url": f"https://{HIDDEN}@host/path",
        "kept": "the word monkey, hf_short",
    }


def test_a_run_writes_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", PASSWORD)
    run = trainer(tmp_path, max_train_steps=1, num_validation_images=1, hub_model_id=f"me/{TOKEN}", tracker_project_name=PASSWORD)
    run.train()
    printed = capsys.readouterr()
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] + [printed.out.encode(), printed.err.encode()]
    assert not [text for text in texts if TOKEN.encode() in text or PASSWORD.encode() in text]
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["hub_model_id"] == f"me/{HIDDEN}"


def test_an_error_line_holds_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> None:
        raise reject("pretrained_model_name_or_path", f"https://me:{PASSWORD}@host/{TOKEN}", "a folder")

    with pytest.raises(SystemExit):
        run_cli(wrong)
    line = capsys.readouterr().err
    assert line.count(HIDDEN) == 2 and TOKEN not in line and PASSWORD not in line


# ---------------------------------------------------------------------- text of others in a model card

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "](http://evil.example) [click](http://evil.example)",
    "![x](http://evil.example/pixel.png)",
    "a\n# Heading\n\n- item",
    "cell | cell",
    "``` `code` ```",
    "&lt;b&gt; & \\",
)


def test_text_from_outside_is_shown_as_it_is() -> None:
    """Judged by a Markdown renderer: no element that the card does not have of itself, and every character is there."""
    markdown_it = pytest.importorskip("markdown_it")

    def rendered(captions: tuple[str, ...], teacher: str, metrics: dict[str, Any]) -> Any:
        call: dict[str, Any] = {"timesteps": [999]}
        record = {"samplers": [{"timesteps": [999], "call": call}], "sampling": "sde", "scheduler": "LCMScheduler", "teacher": teacher}
        code = usage(call, {"prompt": list(captions)}, False)
        card = model_card(record | {"metrics": metrics, "hyper_parameters": metrics}, code, "samples.png", captions)
        body = card.split("\n---\n", 1)[1]
        return markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)

    def elements(tokens: Any) -> list[str]:
        inline = [child for token in tokens for child in (token.children or [])]
        return sorted(t.type for t in [*tokens, *inline] if t.type not in ("text", "entity", "softbreak", "text_special"))

    def shown(tokens: Any) -> str:
        inline = [child for token in tokens for child in (token.children or [])]
        return "".join(token.content for token in inline if token.type in ("text", "entity", "text_special"))

    plain = rendered(("word",) * len(HOSTILE), "owner/word", {f"name {i}": "word" for i in range(len(HOSTILE))})
    hostile = rendered(HOSTILE, "owner/" + HOSTILE[0].replace("/", ""), {f"{text} {i}": text for i, text in enumerate(HOSTILE)})
    assert elements(hostile) == elements(plain)
    assert all(text.replace("\n", " ") in shown(hostile) for text in HOSTILE)
