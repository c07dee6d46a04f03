"""Strict YAML for settings: a repeated name is an error, and every error says where it is."""

from collections.abc import Hashable
from typing import Any

import yaml

from tealightning.errors import UserError


class _SafeLoader(yaml.SafeLoader):
    """Refuses what YAML takes without a word: of two settings with the same name the last would win. A character that
    JSON writes as a pair of escapes is read as the one that it is; half of it, which no file can hold, is refused."""

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        value = super().construct_scalar(node)
        try:
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le") if isinstance(value, str) else value
        except UnicodeDecodeError:
            raise yaml.constructor.ConstructorError(
                problem="a text holds half a character (a lone surrogate)", problem_mark=node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        first: dict[str, yaml.ScalarNode] = {}
        for key in names:
            if first.setdefault(key.value, key) is not key:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} is set twice, here and in line {first[key.value].start_mark.line + 1}",
                    problem_mark=key.start_mark,
                )
        return super().construct_mapping(node, deep)


def load_yaml(text: str, name: str) -> Any:
    """The document in `text`; `name` is the file's, for messages.

    Raises:
        UserError: if it is no YAML, a setting is given twice, or a value is none that YAML has (a date 2026-13-45).
    """
    try:
        return yaml.load(text, Loader=_SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{name}{line}: this is not YAML: {error.problem}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: this is not YAML: {' '.join(str(error).split())}.") from None
