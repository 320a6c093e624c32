"""YAML loader that rejects duplicate keys. PyYAML would silently use the last value of a duplicate key."""

import os
from collections.abc import Iterator
from typing import Any

import jsonargparse
import yaml

from lrm_pl.errors import InputError


def load_yaml(text: str, path: str | os.PathLike[str] = "") -> Any:  # noqa: ANN401 - any YAML value
    """Load YAML as jsonargparse does.

    Args:
        text: The YAML text.
        path: Path of the file for error messages. jsonargparse does not pass the path of a section's file.

    Raises:
        InputError: A mapping contains a key twice.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for first, second in _duplicate_keys(root, set()):
        raise InputError(
            subject=os.path.abspath(path) if path else "a section's file, or an option",
            expected="each key once",
            found=(
                f"{second.value} on line {second.start_mark.line + 1} and on line {first.start_mark.line + 1}"
            ),
            remedy="merge the two entries",
        )
    return jsonargparse.get_loader("yaml")(text)


def _duplicate_keys(node: yaml.Node | None, visited: set[int]) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Yield pairs of a previous and a repeated occurrence of a key in a mapping."""
    if id(node) in visited:  # the node is an alias
        return
    visited.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicate_keys(item, visited)
    elif isinstance(node, yaml.MappingNode):
        keys: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    yield keys[key.value], key
                keys[key.value] = key
            yield from _duplicate_keys(value, visited)
