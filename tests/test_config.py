"""One set of dataclasses behind Python, YAML and flags: values, precedence and every error line."""

import ast
import dataclasses
import errno
import inspect
import itertools
import json
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from diffusion_distill.config import TeacherConfig, difference, from_mapping, parse, read_yaml, run_cli, to_mapping
from diffusion_distill.data import DataConfig
from diffusion_distill.errors import CheckpointError, InputError, LostRankError, NonFiniteError, reject
from diffusion_distill.methods import DMD2, METHODS
from diffusion_distill.train_config import TrainConfig

TEACHER = ["--pretrained_model_name_or_path", "teacher"]
GROUPS = (TeacherConfig, DataConfig, TrainConfig, DMD2)


@dataclass
class Loop:
    """Fields of every supported type."""

    steps: int
    """Number of steps."""
    rate: float = 1e-3
    """Learning rate."""
    crop: bool = True
    """Crop images."""
    kind: Literal["sde", "ode"] = "sde"
    """Kind of sampler."""
    limit: int | None = None
    """Largest number of files."""
    names: tuple[str, ...] = ()
    """Names to show."""
    size: tuple[int, float] = (1, 2.0)
    """A pair."""
    weights: list[float] = field(default_factory=list)
    """Weights of the terms."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise reject("steps", self.steps, "1 or more")


def parsed(*argv: str, groups: tuple[type, ...] = (Loop,)) -> Any:
    return parse(argv, *groups, prog="train", description="Train.")


def written(folder: Path, text: str) -> str:
    path = folder / "file.yaml"
    path.write_text(text)
    return str(path)


def message(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------- the three sources


def test_flags_of_every_type():
    argv = "--steps 3 --rate 1e-4 --no_crop --kind ode --limit 7 --names a b --size 4 5 --weights 1 2"
    assert parsed(*argv.split()) == (Loop(3, 1e-4, False, "ode", 7, ("a", "b"), (4, 5.0), [1.0, 2.0]),)


def test_yaml_of_every_type(tmp_path):
    text = "steps: 3\nrate: 1e-4\ncrop: false\nkind: ode\nlimit: null\nnames: [a, b]\nsize: [4, 5]\nweights: [1, 2e0]\n"
    (loop,) = parsed("--config", written(tmp_path, text))
    assert loop == Loop(3, 1e-4, False, "ode", None, ("a", "b"), (4, 5.0), [1.0, 2.0])
    assert [type(v) for v in (loop.rate, loop.size[1], loop.weights[0])] == [float] * 3


def test_flags_come_before_yaml_and_yaml_before_defaults(tmp_path):
    path = written(tmp_path, "steps: 5\nrate: 0.5\ncrop: false\nnames: [a]\n")
    (loop,) = parsed("--rate", "0.25", f"--config={path}", "--names")
    assert loop == Loop(5, 0.25, False, names=())
    assert parsed("--config", path, "--crop")[0].crop is True


def test_checks_see_the_final_values_only(tmp_path):
    path = written(tmp_path, "steps: -1\n")
    assert parsed("--config", path, "--steps", "2") == (Loop(2),)


def test_a_semantic_error_reads_the_same_from_python_yaml_and_flags(tmp_path):
    path = written(tmp_path, "min_level: 2\n")
    lines = {
        message(lambda: DMD2(min_level=2.0)),
        message(lambda: from_mapping(DMD2, {"min_level": 2}, "file.yaml")),
        message(lambda: parsed("--config", path, groups=(DMD2,))),
        message(lambda: parsed("--min_level", "2", groups=(DMD2,))),
    }
    assert lines == {"min_level, max_level: got (2.0, 0.98); 0 <= min_level < max_level <= 1"}


def test_instances_come_in_the_order_of_the_groups():
    argv = [*TEACHER, "--timesteps", "999", "749", "--dataset", "digits", "--output_dir", "out"]
    teacher, data, loop, method = parsed(*argv, groups=GROUPS)
    assert (teacher, data, loop) == (TeacherConfig("teacher"), DataConfig(dataset="digits"), TrainConfig(output_dir="out"))
    assert type(method) is DMD2 and method == DMD2(timesteps=(999.0, 749.0))


@pytest.mark.parametrize("method", METHODS.values())
def test_methods_share_no_field_with_the_other_groups(method):
    assert type(parsed(*TEACHER, "--num_classes", "3", groups=(TeacherConfig, DataConfig, TrainConfig, method))[3]) is method


def test_the_process_arguments_are_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--steps", "4"])
    assert parse(None, Loop, prog="train", description="Train.") == (Loop(4),)


def test_a_name_in_two_groups_is_a_programming_error():
    other = dataclasses.make_dataclass("Other", [("rate", float, 0.0)])
    with pytest.raises(AssertionError, match="two groups have a field 'rate'"):
        parsed("--steps", "1", groups=(Loop, other))
    with pytest.raises(AssertionError, match="--config"):
        parsed(groups=(dataclasses.make_dataclass("Clash", [("config", str, "")]),))
    with pytest.raises(AssertionError, match="have no form"):
        from_mapping(dataclasses.make_dataclass("Odd", [("x", complex, 0j)]), {}, "file.yaml")


# ---------------------------------------------------------------------- help and usage


def docstrings(group: type) -> dict[str, str]:
    """The text below each field in the source of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(group))).body[0].body
    return {
        f.target.id: inspect.cleandoc(d.value.value)
        for f, d in itertools.pairwise(body)
        if isinstance(f, ast.AnnAssign) and isinstance(d, ast.Expr)
    }


def test_help_names_every_field_with_its_docstring(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # wider ones show two columns
    with pytest.raises(SystemExit) as caught:
        parsed("--help", groups=GROUPS)
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    documented = {name: text for group in GROUPS for name, text in docstrings(group).items()}
    assert set(documented) == {f.name for group in GROUPS for f in dataclasses.fields(group)}
    for name, text in documented.items():
        assert f"--{name} " in shown.replace(",", " "), name
        assert " ".join(text.split()) in shown, name
    assert "YAML file of values" in shown and "DMD2 options" in shown


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--steps", "1", "--rat", "3"], "--rate"),
        (["--steps", "1", "--rate", "fast"], "could not convert string to float: 'fast'"),
        (["--steps", "1", "--kind", "euler"], "sde"),
        ([], "--steps"),
        (["--steps", "1", "--config"], "expected one argument"),
    ],
)
def test_wrong_usage_is_one_line_that_says_what_is_accepted(argv, text, capsys):
    line = message(lambda: parsed(*argv))
    assert text in line and not set("│─╭╰") & set(line)
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------- mappings


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("steps: 1\nguidance_scal: 2", "file.yaml: unknown key 'guidance_scal'; did you mean 'guidance_scale'?"),
        ("guidance-scale: 2", "file.yaml: unknown key 'guidance-scale'; did you mean 'guidance_scale'?"),
        ("zzz: 2", "file.yaml: unknown key 'zzz'; no name comes near it; --help lists them"),
        ("7: 2", "file.yaml: unknown key 7; no name comes near it; --help lists them"),
        ("rate: fast", "file.yaml: rate: got 'fast'; accepted: a number"),
        ("rate: true", "file.yaml: rate: got True; accepted: a number"),
        ("rate: 'inf'", "file.yaml: rate: got 'inf'; accepted: a number"),
        ("rate: [1]", "file.yaml: rate: got [1]; accepted: a number"),
        ("steps: 1.5", "file.yaml: steps: got 1.5; accepted: a whole number"),
        ("steps: true", "file.yaml: steps: got True; accepted: a whole number"),
        ("steps: null", "file.yaml: steps: got None; accepted: a whole number"),
        ("crop: yes", "file.yaml: crop: got 'yes'; accepted: true or false"),
        ("crop: 1", "file.yaml: crop: got 1; accepted: true or false"),
        ("kind: euler", "file.yaml: kind: got 'euler'; accepted: one of 'sde', 'ode'"),
        ("limit: some", "file.yaml: limit: got 'some'; accepted: a whole number or null"),
        ("names: a", "file.yaml: names: got 'a'; accepted: a list, each text (quote it if need be)"),
        ("names: [1]", "file.yaml: names: got [1]; accepted: a list, each text (quote it if need be)"),
        ("size: [1]", "file.yaml: size: got [1]; accepted: a list of 2: a whole number, a number"),
        ("weights: {a: 1}", "file.yaml: weights: got {'a': 1}; accepted: a list, each a number"),
        ("rate: 1", "file.yaml: missing 'steps'"),
        ("steps: 0", "steps: got 0; 1 or more"),
    ],
)
def test_error_lines_of_mappings(text, line):
    scale = dataclasses.make_dataclass("Scale", [("guidance_scale", float, 1.0)])
    assert (
        message(
            lambda: from_mapping((Loop, scale), yaml.load(text, yaml.BaseLoader) if "yes" in text else yaml.safe_load(text), "file.yaml")
        )
        == line
    )


def test_every_missing_key_is_named():
    assert (
        message(lambda: from_mapping((TeacherConfig, Loop), {}, "run.json")) == "run.json: missing 'pretrained_model_name_or_path', 'steps'"
    )


def test_the_same_lines_come_out_of_a_file(tmp_path):
    path = written(tmp_path, "rat: 1\n")
    assert message(lambda: parsed("--config", path)) == f"{path}: unknown key 'rat'; did you mean 'rate'?"


@pytest.mark.parametrize("loads", [lambda m: m, lambda m: json.loads(json.dumps(m)), lambda m: yaml.safe_load(yaml.safe_dump(m))])
def test_mappings_round_trip_exactly(loads):
    instances = (
        TeacherConfig("teacher", variant="fp16", revision="1234"),
        DataConfig(train_data_dir="images", resolution=64, center_crop=False),
        TrainConfig(learning_rate=1e-7 / 3, validation_prompts=("a", "1e-4", "no"), mixed_precision="no", lora_alpha=3),
        DMD2(timesteps=(999.0, 0.1 + 0.2), gan_weight=0, fake_score_learning_rate=5e-324),
        Loop(2, float("inf"), size=(3, 0.1), weights=[1.0, -0.0]),
    )
    mapping = loads(to_mapping(*instances))
    assert from_mapping([type(i) for i in instances], mapping, "run.json") == instances
    assert from_mapping([type(i) for i in instances[:2]], to_mapping(*instances[:2]), "run.json") == instances[:2]


def test_a_single_group_gives_a_single_instance():
    assert from_mapping(Loop, {"steps": 1, "names": ["a"]}, "file.yaml") == Loop(1, names=("a",))


def test_text_stays_text_where_a_field_takes_both():
    both = dataclasses.make_dataclass("Both", [("x", float | str | None, None)])
    assert from_mapping(both, {"x": "1e-4"}, "f").x == "1e-4"
    assert from_mapping(both, {"x": 2}, "f").x == 2.0


def test_true_is_not_one_among_choices():
    pick = dataclasses.make_dataclass("Pick", [("x", Literal[1, 2], 1)])
    assert message(lambda: from_mapping(pick, {"x": True}, "f")) == "f: x: got True; accepted: one of 1, 2"


def test_difference_names_key_stored_and_present_value():
    stored = {"rate": 0.1, "kind": "sde", "gone": None, "same": [1]}
    now = {"rate": 0.2, "kind": "sde", "new": 1, "same": [1]}
    assert difference(stored, now) == ["rate: stored 0.1, now 0.2", "gone: stored None, now absent", "new: stored absent, now 1"]
    assert difference(to_mapping(DMD2()), json.loads(json.dumps(to_mapping(DMD2())))) == []


# ---------------------------------------------------------------------- files


def test_yaml_words_are_not_booleans(tmp_path):
    assert read_yaml(written(tmp_path, "a: no\nb: off\nc: yes\nd: true\ne: False\n")) == {
        "a": "no",
        "b": "off",
        "c": "yes",
        "d": True,
        "e": False,
    }
    (config,) = parsed("--config", written(tmp_path, "mixed_precision: no\n"), groups=(TrainConfig,))
    assert config.mixed_precision == "no"


def test_an_empty_file_sets_nothing(tmp_path):
    assert parsed("--steps", "1", "--config", written(tmp_path, "# nothing\n")) == (Loop(1),)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "key 'a' is given twice"),
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "got a list; accepted: one 'key: value' a line"),
        ("!!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_error_lines_of_files(tmp_path, text, line):
    path = written(tmp_path, text)
    found = message(lambda: read_yaml(path))
    assert found.startswith(path) and line in found


def test_a_missing_or_binary_file_is_named(tmp_path):
    path = tmp_path / "none.yaml"
    assert message(lambda: parsed("--config", str(path))) == f"config: got '{path}'; a YAML file is needed (No such file or directory)"
    path.write_bytes(b"\xff\xfe\x00")
    assert str(path) in message(lambda: read_yaml(path))


# ---------------------------------------------------------------------- exit codes


def fails(error: BaseException) -> Any:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "err"),
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (fails(InputError("rate: got 1;\n  less")), 2, "error: rate: got 1; less\n"),
        (fails(NonFiniteError("step 3:\n  nan")), 3, "error: step 3: nan\n"),
        (fails(CheckpointError("no room")), 4, "error: no room\n"),
        (fails(LostRankError("rank 1")), 5, "error: rank 1\n"),
        (fails(OSError(errno.ENOSPC, "No space left on device", "x")), 4, "error: [Errno 28] No space left on device: 'x'\n"),
        (fails(KeyboardInterrupt()), 130, ""),
    ],
)
def test_exit_codes(main, code, err, capsys):
    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == err


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_cli(fails(ZeroDivisionError()))


def test_a_wrong_flag_value_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        run_cli(lambda: print(parsed("--steps", "0")))
    out, err = capsys.readouterr()
    assert (caught.value.code, out, err) == (2, "", "error: steps: got 0; 1 or more\n")
