"""The same dataclasses as Python objects, YAML files and command-line flags.

Names are flat: every field of every group is one key of the file and one flag. A group's `__post_init__` runs once, on the
final values, so a wrong value reads the same wherever it came from.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import io
import math
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints, overload

import tyro
import yaml

from .errors import CheckpointError, InputError, RunError, reject
from .redaction import redacted

T = TypeVar("T")

_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text (quote it if need be)", types.NoneType: "null"}
_CONFIG_HELP = "YAML file of values by the names of these flags. Flags override it."


@dataclasses.dataclass
class TeacherConfig:
    """The pretrained pipeline to distil."""

    pretrained_model_name_or_path: str
    """Folder of a diffusers pipeline, or its name on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    trust_remote_code: bool = False
    """Run pipeline code that comes with the weights."""
    allow_bin_weights: bool = False
    """Read weights that are stored as pickles (.bin) alone, with torch's restricted reader. Off: safetensors only."""
    video_size: tuple[int, ...] = ()
    """Frames, height and width of the videos that teacher and student draw. Empty: the size that the pipeline draws of itself."""

    def __post_init__(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise reject("pretrained_model_name_or_path", "", "a folder or a name on the Hub")
        if len(self.video_size) not in (0, 3):
            raise reject("video_size", self.video_size, "three numbers, frames, height and width, or none")


def parse(argv: Sequence[str] | None, *groups: type, prog: str, description: str) -> tuple[Any, ...]:
    """One instance of each group from flags, `--config file.yaml` and defaults, in falling order of precedence.

    `argv` None reads the process's own arguments. `--help` prints and exits.

    Raises:
        InputError: for wrong usage (unknown or missing flags, text where a number is due), wrong values and wrong files.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    assert "config" not in _types(groups), "the field name 'config' is taken by the flag --config"
    finder = _Finder(prog=prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    given = {} if path is None else _convert_all(groups, read_yaml(path), path)
    drafts = _from_flags(_draft_of_all(groups, given), argv, prog, description)
    return tuple(group(**_values(getattr(drafts, group.__name__))) for group in groups)


class _Finder(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _from_flags(draft: type[Any], argv: Sequence[str], prog: str, description: str) -> Any:
    said = io.StringIO()
    options = (tyro.conf.OmitArgPrefixes,)
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(draft, args=argv, prog=prog, description=description, config=options, use_underscores=True)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(f"{_without_frame(said.getvalue())}; {prog} --help explains every flag") from None


def _without_frame(text: str) -> str:
    """What tyro says in a box of several lines, without its title and its closing advice."""
    lines = [line.strip("╭╮╰╯│─ ") for line in text.splitlines() if not line.startswith("╭")]
    words = " ".join(filter(None, lines))
    return words.split(" For full helptext")[0].rstrip(".;")


@overload
def from_mapping(groups: type[T], mapping: Mapping[str, Any], source: str) -> T: ...
@overload
def from_mapping(groups: Sequence[type], mapping: Mapping[str, Any], source: str) -> tuple[Any, ...]: ...
def from_mapping(groups: Any, mapping: Mapping[str, Any], source: str) -> Any:
    """An instance of a dataclass, or a tuple of them, from one flat mapping.

    InputError names `source` and the key: for unknown keys, missing ones, and values of another type. Whole numbers and
    numeric text ("1e-4", which YAML 1.1 reads as text) will do for numbers, lists for tuples, null for optional fields.
    """
    several = (groups,) if isinstance(groups, type) else tuple(groups)
    values = _convert_all(several, mapping, source)
    missing = [f.name for group in several for f in _fields(group) if _is_required(f) and f.name not in values]
    if missing:
        raise InputError(f"{source}: missing {', '.join(map(repr, missing))}")
    made = tuple(group(**{f.name: values[f.name] for f in _fields(group) if f.name in values}) for group in several)
    return made[0] if isinstance(groups, type) else made


def to_mapping(*instances: Any) -> dict[str, Any]:
    """One flat mapping for JSON or YAML, from which `from_mapping` makes equal instances."""
    _types([type(instance) for instance in instances])
    return {name: _plain(value) for instance in instances for name, value in _values(instance).items()}


def difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each key whose value differs between two mappings of `to_mapping`."""
    lines = []
    for key in dict.fromkeys([*stored, *now]):
        before, after = (repr(m[key]) if key in m else "absent" for m in (stored, now))
        if (key in stored) != (key in now) or stored[key] != now[key]:
            lines.append(f"{key}: stored {before}, now {after}")
    return lines


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with what it returns; with one line on stderr and a code of its own for what is foreseen.

    The codes stand in `errors.py`; a full disk has that of a checkpoint that could not be written, an interrupt 130.
    """
    try:
        code = main() or 0
    except (InputError, RunError) as error:
        code = _say(error, error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        code = _say(error, CheckpointError.exit_code)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _say(error: Exception, code: int) -> int:
    print("error:", redacted(" ".join(str(error).split())), file=sys.stderr)
    return code


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The flat mapping in a YAML file. InputError: no such file, not YAML, not a mapping, a key given twice."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = yaml.load(text, _StrictLoader)
    except OSError as error:
        raise reject("config", str(path), f"a YAML file is needed ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no day of a month, thousands of digits
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: got a {type(content).__name__}; accepted: one 'key: value' a line")
    return content


class _StrictLoader(yaml.SafeLoader):
    """PyYAML without its surprises: it keeps the last of two equal keys, and reads no, off and yes as booleans (YAML 1.1)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_BOOL = "tag:yaml.org,2002:bool"
_StrictLoader.yaml_implicit_resolvers = {
    first: [entry for entry in entries if entry[0] != _BOOL] for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def _fields(group: Any) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(group) if f.init]


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _values(instance: Any) -> dict[str, Any]:
    return {f.name: getattr(instance, f.name) for f in _fields(instance)}


def _types(groups: Iterable[type]) -> dict[str, Any]:
    """Annotations of all fields by name. Two groups must not share a name, and every type must have a text form."""
    kinds: dict[str, Any] = {}
    for group in groups:
        hints = get_type_hints(group)
        for f in _fields(group):
            assert f.name not in kinds, f"two groups have a field {f.name!r}"
            kinds[f.name] = hints[f.name]
            _describe(kinds[f.name])
    return kinds


def _draft_of_all(groups: Sequence[type], given: Mapping[str, Any]) -> type[Any]:
    """A dataclass of one field a group: the group itself with `given` as its defaults and without its checks."""
    members: list[Any] = [("config", Annotated[str | None, tyro.conf.arg(help=_CONFIG_HELP, metavar="FILE")], None)]
    for group in groups:
        draft = type(group.__name__, (group,), {"__post_init__": lambda self: None, "__module__": group.__module__})
        start = {f.name: given.get(f.name, tyro.MISSING) for f in _fields(group) if f.name in given or _is_required(f)}
        members.append((group.__name__, draft, dataclasses.field(default_factory=functools.partial(draft, **start))))
    return dataclasses.make_dataclass("Arguments", members)


def _convert_all(groups: Sequence[type], mapping: Mapping[str, Any], source: str) -> dict[str, Any]:
    kinds = _types(groups)
    for key in mapping:
        if key not in kinds:
            close = difflib.get_close_matches(str(key), kinds, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "no name comes near it; --help lists them"
            raise InputError(f"{source}: unknown key {key!r}; {hint}")
    return {key: _convert_named(f"{source}: {key}", value, kinds[key]) for key, value in mapping.items()}


def _convert_named(name: str, value: Any, kind: Any) -> Any:
    try:
        return _convert(value, kind)
    except TypeError:
        raise reject(name, value, f"accepted: {_describe(kind)}") from None


def _convert(value: Any, kind: Any) -> Any:
    """`value` as an instance of the annotation `kind`; TypeError where it is not one."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal and any(value == a and type(value) is type(a) for a in args):
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, args)
    if origin in (tuple, list) and isinstance(value, list | tuple):
        return origin(_convert_items(value, args))
    if kind is float and not isinstance(value, bool):
        return _convert_number(value)
    if kind in _SCALARS and type(value) is kind:
        return value
    raise TypeError


def _convert_union(value: Any, members: Sequence[Any]) -> Any:
    if type(value) in members:
        return value
    for member in members:
        try:
            return _convert(value, member)
        except TypeError:
            continue
    raise TypeError


def _convert_items(values: Sequence[Any], kinds: Sequence[Any]) -> list[Any]:
    kinds = [kinds[0]] * len(values) if len(kinds) == 1 or kinds[-1] is Ellipsis else kinds
    if len(kinds) != len(values):
        raise TypeError
    return [_convert(value, kind) for value, kind in zip(values, kinds)]


def _convert_number(value: Any) -> float:
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            raise TypeError from None
        if math.isfinite(number):  # "nan" and "inf" in text are names of something else
            return number
    elif isinstance(value, int | float):
        return float(value)
    raise TypeError


def _describe(kind: Any) -> str:
    """What a field annotated `kind` accepts, in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, args))
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return f"a list, each {_describe(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: {', '.join(map(_describe, args))}"
    assert kind in _SCALARS, f"fields of type {kind} have no form in YAML and flags"
    return _SCALARS[kind]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
