"""Tests of the inputs, result names and file handling of `lrm infer`."""

import contextlib
import json
import os
import subprocess
import sys

import pytest

from lrm_pl.apps.infer import main
from lrm_pl.errors import InputError
from lrm_pl.inference import result_folder
from lrm_pl.inference.find_images import find_images
from lrm_pl.inference.options import MeshOptions
from lrm_pl.inference.result_folder import _files_for, _files_of, _require_own, _write


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return [folder / name for name in names]


def test_skipped_files_of_a_folder_are_listed(tmp_path):
    touch(tmp_path, "a.png", "b.JFIF", "c.avif", "d.tif", "e.HEIC", "notes.txt", ".DS_Store")
    images, others = find_images([tmp_path])
    assert list(images) == ["a", "b", "c", "d"]
    assert [path.name for path in others] == ["e.HEIC", "notes.txt"]


def test_a_broken_symbolic_link_is_listed_as_an_image(tmp_path):
    touch(tmp_path, "a.png")
    (tmp_path / "photo.png").symlink_to("gone.png")
    assert list(find_images([tmp_path])[0]) == ["a", "photo"]


def test_characters_outside_the_output_encoding_are_escaped():
    code = "from lrm_pl.paths import escape_names; escape_names(); print('\\udcff\\u2191')"
    for encoding, expected in (("utf-8", b"\\udcff\xe2\x86\x91\n"), ("latin-1", b"\\udcff\\u2191\n")):
        environment = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
        assert done.stdout == expected


def test_images_with_the_same_name_have_different_result_folders(tmp_path):
    twins = touch(tmp_path / "x", "anim.png", "anim.webp")
    assert list(find_images(twins)[0]) == ["anim.png", "anim.webp"]
    fronts = touch(tmp_path / "chair", "front.jpg") + touch(tmp_path / "table", "front.jpg", "side.jpg")
    assert list(find_images(fronts)[0]) == ["chair-front.jpg", "table-front.jpg", "side"]
    assert find_images([fronts[0], fronts[0]])[0] == {"front": fronts[0]}
    far = touch(tmp_path / "other" / "chair", "front.jpg")
    with pytest.raises(
        InputError, match=r"chair/front.jpg and .*other/chair/front.jpg, which would both be written"
    ):
        find_images(fronts + far)


def test_files_that_are_not_listed_in_an_existing_record_are_not_overwritten(tmp_path):
    touch(tmp_path, "input.png", "mesh.obj")
    files = _files_for(MeshOptions(frames=0))
    assert files == {"input.png", "mesh.glb", "result.json"}
    with pytest.raises(InputError, match=r"found input.png, which result.json does not list. Move"):
        _require_own(tmp_path, files, _files_of(tmp_path))
    (tmp_path / "result.json").write_text(json.dumps({"files": ["input.png", "../up.png", 3]}))
    earlier = _files_of(tmp_path)
    assert earlier == {"input.png", "result.json"}
    _require_own(tmp_path, files, earlier)


def test_the_record_lists_all_written_files_after_an_interruption(tmp_path, monkeypatch):
    """Replace a result of two files by one of three, interrupted before each write in turn."""
    first = {"mesh.obj": b"1", "input.png": b"1"}
    mesh, orbit = {"mesh.glb": b"2", "input.png": b"2"}, {"orbit.mp4": b"2"}
    write, ends = result_folder.write_atomically, []

    def dying(path, content):
        if not ends:
            raise KeyboardInterrupt
        ends.pop()
        write(path, content)

    def work(out):
        for files, record, present in (
            (mesh, {"files": sorted(mesh), "finished": False}, _files_of(out)),
            (orbit, {"files": sorted(mesh | orbit), "finished": True}, {*mesh, "result.json"}),
        ):
            _write(out, files, record, present)

    for writes in range(8):
        out = tmp_path / str(writes)
        _write(out, first, {"files": sorted(first), "finished": True}, set())
        ends[:] = [None] * writes
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(result_folder, "write_atomically", dying)
            work(out)
        record = json.loads((out / "result.json").read_text())
        there = {path.name for path in out.iterdir()} - {"result.json"}
        assert there <= set(record["files"]), writes
        if record["finished"]:
            assert there == set(record["files"])
            assert {(out / name).read_bytes() for name in there} == {b"1" if writes == 0 else b"2"}
        _require_own(out, {*mesh, *orbit}, _files_of(out))
        work(out)
        assert {path.name for path in out.iterdir()} == {*mesh, *orbit, "result.json"}


def test_a_glob_pattern_is_expanded_to_images(tmp_path):
    a, b = touch(tmp_path / "in", "a.png", "b.png")
    touch(tmp_path / "in", "c.txt")
    assert list(find_images([tmp_path / "in" / "*.png"])[0].values()) == [a, b]
    dots = touch(tmp_path / "in", "...png")
    assert list(find_images(dots)[0]) == ["...png"], "the stem would be the parent folder"
    odd = touch(tmp_path / "in", "d[1].png")
    assert list(find_images(odd)[0].values()) == odd, "an existing path is not a pattern"
    with pytest.raises(InputError, match=r"at .*in/\*.jpg, but found neither"):
        find_images([tmp_path / "in" / "*.jpg"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--formats", "glb", "obj", "a.png"],
            "found 'a.png'. Put images before the option: lrm infer IMAGE",
        ),
        (
            ["--texture", "a.png"],
            "expected a number of pixels or no value, but found 'a.png'. Put images before",
        ),
        (["https://example.com/a.png"], "on this machine, but found the URL https://example.com/a.png"),
        (["a.png", "--out", "s3://bucket/out"], "found the URL s3://bucket/out"),
        ([""], "expected a path, but found an empty string"),
    ],
)
def test_invalid_option_values_and_paths_are_rejected_with_a_remedy(words, message, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert message in " ".join(capsys.readouterr().err.split())


def test_invalid_commands_are_rejected_before_slow_imports(tmp_path):
    """Run all commands in one new process, which records the imported modules."""
    (tmp_path / "a.png").touch()
    program = """
import json, sys
from lrm_pl.__main__ import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["lrm", *words]
    try:
        main()
    except SystemExit as end:
        print(json.dumps([str(end), sorted({"torch", "lightning", "scipy", "trimesh"} & set(sys.modules))]))
"""
    commands = (
        (["infer", "nosuch.png"], "found neither"),
        (["infer", "a.png", "--resolution", "4"], "expected resolution from 8 to 1024, but found 4"),
        (["infer", "a.png", "--fov", "190"], "fov_deg between 0 and 180"),
        (["infer", "a.png", "--threshold=-1"], "expected a threshold above 0, but found -1"),
        (["infer", "a.png"], "expected a trained model in runs/lrm, but found none"),
        (["infer", "a.png", "--ckpt", "nosuch"], "found nothing at nosuch"),
        (["evaluate", "--ckpt", "nosuch"], "found nothing at nosuch"),
        (["serve", "--ckpt", "nosuch"], "found nothing at nosuch"),
        (["serve", "--resolution", "2048"], "expected resolution from 16 to 1024, but found 2048"),
        (["demo", "--ckpt", "nosuch"], "found nothing at nosuch"),
        (["view", "nosuch"], "expected a run folder at nosuch, but found none"),
        (["export", "nosuch", "out"], "found nothing at nosuch"),
        (["export", "a.png", "."], "The folder . cannot be created because it exists"),
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps([words for words, _ in commands])],
        cwd=tmp_path, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ends) == len(commands), done.stderr
    for (words, message), (error, imported) in zip(commands, ends, strict=True):
        assert message in error, words
        assert not imported, words


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', "\udcff"])
def test_a_damaged_record_lists_no_files(text, tmp_path):
    (tmp_path / "result.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert _files_of(tmp_path) == set()
