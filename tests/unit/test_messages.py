"""Texts of error messages."""

import pytest

from lrm_pl.errors import InputError, counted, error_subject


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [(0, "object", "0 objects"), (1, "object", "1 object"), (2, "shard", "2 shards"), (1, "process", "1 process"),
     (2, "Blender process", "2 Blender processes"), (1, "mesh", "1 mesh"), (3, "mesh", "3 meshes")],
)  # fmt: skip
def test_counts_are_formatted_with_singular_or_plural(number, noun, words):
    assert counted(number, noun) == words


def test_error_subject_adds_a_subject_only_to_errors_without_subject():
    with pytest.raises(InputError, match=r"^inner: expected a, but found b\. Fix it$"):
        with error_subject("outer"), error_subject("inner"):
            raise InputError("a", "b", "fix it")
