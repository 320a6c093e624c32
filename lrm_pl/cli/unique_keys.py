"""YAML loader that rejects duplicate keys. PyYAML would silently use the last value of a duplicate key."""

import os
from typing import Any

import jsonargparse
import yaml

from lrm_pl.errors import InputError


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that raises an ``InputError`` if a mapping contains a key twice.

    Attributes:
        subject: Name of the loaded text in error messages.
    """

    subject: str

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        """Compose a mapping and check its keys."""
        node = super().compose_mapping_node(anchor)
        keys: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            first = keys.setdefault(key.value, key) if isinstance(key, yaml.ScalarNode) else key
            if first is not key:
                raise InputError(
                    subject=self.subject,
                    expected="each key once",
                    found=f"{key.value} on line {key.start_mark.line + 1} and on line {first.start_mark.line + 1}",
                    remedy="merge the two entries",
                )
        return node


def load_yaml(text: str, path: str | os.PathLike[str] = "") -> Any:  # noqa: ANN401 - any YAML value
    """Load YAML as jsonargparse does.

    Args:
        text: The YAML text.
        path: Path of the file for error messages. jsonargparse does not pass the path of a section's file.

    Raises:
        InputError: A mapping contains a key twice.
    """
    loader = _UniqueKeyLoader(text)
    loader.subject = os.path.abspath(path) if path else "the file of a section, or an option"
    loader.get_single_node()
    return jsonargparse.get_loader("yaml")(text)
