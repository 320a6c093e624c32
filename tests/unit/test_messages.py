"""The words of messages."""

import pytest

from lrm_pl.errors import counted


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [(0, "object", "0 objects"), (1, "object", "1 object"), (2, "shard", "2 shards"), (1, "process", "1 process"),
     (2, "Blender process", "2 Blender processes"), (1, "mesh", "1 mesh"), (3, "mesh", "3 meshes")],
)  # fmt: skip
def test_one_of_a_kind_is_no_plural(number, noun, words):
    assert counted(number, noun) == words
