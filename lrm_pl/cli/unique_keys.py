"""YAML in which a key stands twice in one mapping is refused: the first of two sections would be dropped unseen."""

import os
from collections.abc import Iterator
from typing import Any

import jsonargparse
import yaml

from lrm_pl.errors import InputError


def load_yaml(text: str, path: str | os.PathLike[str] = "") -> Any:  # noqa: ANN401 - whatever it holds
    """Load YAML as jsonargparse does.

    Args:
        text: The YAML.
        path: The file that it is of, for messages; jsonargparse does not know that of a section.

    Raises:
        InputError: A key stands twice in one mapping.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for first, second in _repeated(root, set()):
        where = os.path.abspath(path) if path else "a section's file, or an option"
        raise InputError(
            subject=where,
            expected="each key once",
            found=(
                f"{second.value} on line {second.start_mark.line + 1} and on line "
                f"{first.start_mark.line + 1} already, which would be dropped"
            ),
            remedy="put what is below the two together",
        )
    return jsonargparse.get_loader("yaml")(text)


def _repeated(node: yaml.Node | None, seen: set[int]) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Yield the keys that stand twice in a mapping, each with the one before."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated(item, seen)
    elif isinstance(node, yaml.MappingNode):
        keys: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    yield keys[key.value], key
                keys[key.value] = key
            yield from _repeated(value, seen)
