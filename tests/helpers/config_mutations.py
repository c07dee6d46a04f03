"""Configs that are wrong by construction: each mutation says which setting its refusal has to name.

A mutation is drawn by hypothesis. Nothing here asks the command line whether a config is right.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from hypothesis import strategies as st

Settings = dict[str, Any]


@dataclass(kw_only=True, slots=True, frozen=True)
class Mutation:
    """A wrong config."""

    kind: str
    text: str  # of the file
    names: tuple[str, ...]  # the message has to hold one of them


def dotted(path: tuple[str, ...]) -> str:
    """The key as messages write it."""
    return ".".join(part for part in path if part not in ("init_args", "class_path") and not part.isdigit())


def nodes(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every path below `node` with what is there."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield (*path, str(key)), value
        yield from nodes(value, (*path, str(key)))


def changed(settings: Settings, path: tuple[str, ...], value: Any) -> Settings:
    """A copy with `value` at `path`; mappings on the way are made where they are missing."""
    result = copy.deepcopy(settings)
    node: Any = result
    for part in path[:-1]:
        if isinstance(node, list):
            node = node[int(part)]
        else:
            if not isinstance(node.get(part), dict | list):
                node[part] = {}
            node = node[part]
    node[int(path[-1]) if isinstance(node, list) else path[-1]] = value
    return result


def written(settings: Any) -> str:
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------- one value

ANY_TYPE = {"devices", "strategy", "accelerator", "precision", "val_check_interval", "class_path", "limit_val_batches"}
WRONG_TYPES: dict[type, list[Any]] = {
    bool: ["maybe", [1], {"a": 1}, 7.5],
    int: ["many", 1.5, [1, 2], {"a": 1}, "1e", float("nan")],
    float: ["hot", [0.1], {"a": 1}],
    str: [[1, 2], {"a": 1}, [[]]],
    list: ["x", {"a": 1}, 3.5],
}


@st.composite
def wrong_type(draw: st.DrawFn, base: Settings) -> Mutation:
    leaves = [
        (path, value)
        for path, value in nodes(base)
        if type(value) in WRONG_TYPES and path[-1] not in ANY_TYPE and "callbacks" not in path and path[-1] != "logger"
    ]
    path, value = draw(st.sampled_from(leaves))
    wrong = draw(st.sampled_from(WRONG_TYPES[type(value)]))
    named = path[:-1] if path[-2:-1] == ("weights",) else path  # a mapping of free names has one type
    return Mutation(kind="wrong type", text=written(changed(base, path, wrong)), names=(dotted(named),))


UNKNOWN = ["no_such_setting", "größe", "настройка", "温度", "x-y", "0", "batch size", "__class__", "a" * 300]


FREE = ("rewards", "weights")


def mappings(base: Settings, free: tuple[str, ...] = FREE) -> list[tuple[str, ...]]:
    """Where settings are: not the classes' own level, where `init_args` is, and no mapping of `free` names."""
    inside = [path for path, value in nodes(base) if isinstance(value, dict) and "class_path" not in value]
    return [(), *(p for p in inside if not set(p) & set(free))]


@st.composite
def unknown_key(draw: st.DrawFn, base: Settings, free: tuple[str, ...] = FREE) -> Mutation:
    path = draw(st.sampled_from(mappings(base, free)))
    name = draw(st.sampled_from(UNKNOWN))
    value = draw(st.sampled_from([1, "text", None, {"a": 1}]))
    return Mutation(kind="unknown key", text=written(changed(base, (*path, name), value)), names=(name,))


@st.composite
def misspelt_key(draw: st.DrawFn, base: Settings) -> Mutation:
    inside = [(*path, key) for path in mappings(base) for key in _at(base, path)]
    path = draw(st.sampled_from([p for p in inside if len(p[-1]) > 2 and p[-1] not in ("class_path", "init_args")]))
    at = draw(st.integers(0, len(path[-1]) - 1))
    how = draw(st.sampled_from(["drop", "double", "upper"]))
    old = path[-1]
    new = {"drop": old[:at] + old[at + 1 :], "double": old[: at + 1] + old[at:], "upper": old.upper()}[how]
    result = copy.deepcopy(base)
    node = _at(result, path[:-1])
    node[new] = node.pop(old)
    return Mutation(kind="misspelt key", text=written(result), names=(new,))


def _at(settings: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        settings = settings[int(part)] if isinstance(settings, list) else settings[part]
    return settings


@dataclass(kw_only=True, slots=True, frozen=True)
class Change:
    """Settings of which at least one is wrong."""

    kind: str
    set: dict[str, Any]  # path in the file, by dots (or by slashes, if it has one) -> value
    names: tuple[str, ...] = ()  # empty: the key itself
    wants: Callable[[Settings], bool] = lambda base: True


def of_changes(changes: list[Change], base: Settings) -> st.SearchStrategy[Mutation]:
    return st.sampled_from([c for c in changes if c.wants(base)]).map(lambda change: applied(change, base))


def applied(change: Change, base: Settings) -> Mutation:
    settings = base
    paths = {tuple(key.split("/" if "/" in key else ".")): value for key, value in change.set.items()}
    for path, value in paths.items():
        settings = changed(settings, path, value)
    names = change.names or tuple(dotted(path) for path in paths)
    return Mutation(kind=change.kind, text=written(settings), names=names)


# ---------------------------------------------------------------- structure and syntax


@st.composite
def wrong_structure(draw: st.DrawFn, base: Settings) -> Mutation:
    section = draw(st.sampled_from([key for key, value in base.items() if isinstance(value, dict)]))
    wrong = draw(st.sampled_from([[1, 2], "text", 3.5, True, ["a"], [{"a": 1}]]))
    return Mutation(kind="no mapping", text=written(base | {section: wrong}), names=(section,))


@st.composite
def missing_section(draw: st.DrawFn, base: Settings, needed: list[tuple[str, ...]]) -> Mutation:
    path = draw(st.sampled_from([p for p in needed if p[0] in base]))
    result = copy.deepcopy(base)
    value = draw(st.sampled_from(["gone", None]))
    if value is None:
        result = changed(result, path, None)
    else:
        del _at(result, path[:-1])[path[-1]]
    return Mutation(kind="missing", text=written(result), names=(dotted(path),))


@st.composite
def repeated_key(draw: st.DrawFn, base: Settings) -> Mutation:
    """A line that sets a plain value, twice."""
    lines = written(base).splitlines()
    plain = [i for i, line in enumerate(lines) if not line.lstrip().startswith("-") and not line.endswith(":")]
    plain = [i for i in plain if ": " in lines[i] and (i == 0 or ":" in lines[i])]
    at = draw(st.sampled_from(plain))
    name = lines[at].strip().split(":")[0].strip("'\"")
    return Mutation(kind="repeated key", text="\n".join([*lines[: at + 1], *lines[at:]]), names=(name,))


BROKEN = [
    "\tx: 1", "x: [1, 2", "x: {a: 1", "x: 'open", "x: *nowhere", "x: &a [*a", "@x: 1", "%x", "x: y: z", "x: |2\n a",
    "x: \x01", "x: !!python/object/apply:os.system ['true']", "x: !unknown 1", "x: 2026-13-45", "? [a]\n: 1", "}",
    "`x`: 1", "x: !!int many", "x: !!float hot",
]  # fmt: skip


@st.composite
def broken_yaml(draw: st.DrawFn, base: Settings) -> Mutation:
    lines = written(base).splitlines()
    tops = [i for i, line in enumerate(lines) if not line.startswith((" ", "-"))]
    at = draw(st.sampled_from([*tops, len(lines)]))
    text = "\n".join([*lines[:at], draw(st.sampled_from(BROKEN)), *lines[at:]])
    return Mutation(
        kind="broken YAML", text=text + "\n", names=("this is not YAML", "expected settings", "Unknown setting")
    )
