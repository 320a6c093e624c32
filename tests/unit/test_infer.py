"""Which pictures `lrm infer` takes, what it calls their results, and whose files it leaves alone."""

import json

import pytest

from lrm_pl.apps.infer import Wishes, _files_for, _files_of, _require_own, find_pictures
from lrm_pl.errors import InputError


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


def test_files_of_a_folder_that_are_passed_over_are_listed(tmp_path):
    touch(tmp_path, "a.png", "b.JFIF", "c.avif", "d.tif", "e.HEIC", "notes.txt", ".DS_Store")
    pictures, others = find_pictures([tmp_path])
    assert list(pictures) == ["a", "b", "c", "d"]
    assert [path.name for path in others] == ["e.HEIC", "notes.txt"]


def test_pictures_of_one_name_have_results_of_their_own(tmp_path):
    twins = touch(tmp_path / "x", "anim.png", "anim.webp")
    assert list(find_pictures(twins)[0]) == ["anim.png", "anim.webp"]
    fronts = touch(tmp_path / "chair", "front.jpg") + touch(tmp_path / "table", "front.jpg", "side.jpg")
    assert list(find_pictures(fronts)[0]) == ["chair-front.jpg", "table-front.jpg", "side"]
    assert find_pictures([fronts[0], fronts[0]])[0] == {"front": fronts[0]}
    far = touch(tmp_path / "other" / "chair", "front.jpg")
    with pytest.raises(
        InputError, match=r"chair/front.jpg and .*other/chair/front.jpg, which would both write"
    ):
        find_pictures(fronts + far)


def test_files_that_no_earlier_result_lists_are_neither_removed_nor_written_over(tmp_path):
    touch(tmp_path, "input.png", "mesh.obj")
    files = _files_for(Wishes(frames=0))
    assert files == {"input.png", "mesh.glb", "result.json"}
    with pytest.raises(InputError, match=r"found input.png, which its result.json does not list; move"):
        _require_own(tmp_path, files, _files_of(tmp_path))
    (tmp_path / "result.json").write_text(json.dumps({"files": ["input.png", "../up.png", 3]}))
    earlier = _files_of(tmp_path)
    assert earlier == {"input.png", "result.json"}
    _require_own(tmp_path, files, earlier)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', "\udcff"])
def test_a_damaged_record_lists_nothing(text, tmp_path):
    (tmp_path / "result.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert _files_of(tmp_path) == set()
