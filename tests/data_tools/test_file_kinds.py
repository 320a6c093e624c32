"""Rejection of files that importers would misread without an error."""

import time

import pytest

from data_tools.assets.file_types import FileTypeError, check_mesh_file

OBJ = "# by hand\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvn 0 0 nan\no info\nf 1 2 3\n"
PLY = (
    "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
    "element face 1\nproperty list uchar int vertex_indices\nend_header\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"
)


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.obj", "", "found an empty file"),
        ("a.fbx", " \n", "found an empty file"),
        (
            "a.glb",
            "<!doctype html>",
            "'<!doctype html>'. Check the URL; the file may be an error page of the server",
        ),
        ("a.obj", OBJ.encode("utf-16"), "a.obj: expected UTF-8 text, but found UTF-16"),
        ("a.obj", OBJ.encode("utf-16-be"), "a.obj: expected UTF-8 text, but found UTF-16"),
        ("a.gltf", "{}".encode("utf-16"), "found UTF-16"),
        ("a.obj", OBJ.replace("v 1 0", "v nan 0"), "found 'v nan 0 0' in line 3"),
        ("a.obj", OBJ.replace("v 1 0", "v 1 -Inf").replace("\n", "\r\n"), "found 'v 1 -Inf 0' in line 3"),
        ("a.obj", OBJ.replace("v 1 0", "  v\t1 -1.#IND"), "1.#IND 0' in line 3"),
        ("a.ply", PLY.replace("1 0 0", "1 -nan(ind) 0"), "found '1 -nan(ind) 0' in line 11"),
        ("a.ply", PLY.replace("1 0 0", "1 inf 0").replace("\n", "\r"), "found '1 inf 0'"),
    ],
)
def test_a_file_that_importers_would_misread_is_rejected(tmp_path, name, content, found):
    with pytest.raises(FileTypeError) as refusal:
        check_mesh_file(write(tmp_path, name, content))
    assert found in str(refusal.value)


def test_an_mtl_file_in_utf_16_is_rejected(tmp_path):
    path = write(tmp_path, "a.obj", "mtllib a.mtl\n" + OBJ)
    check_mesh_file(path)  # a missing MTL file is not an error here
    write(tmp_path, "a.mtl", "newmtl a\nKd 1 0 0\n".encode("utf-16"))
    with pytest.raises(FileTypeError, match=r"a\.mtl: expected UTF-8 text"):
        check_mesh_file(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.obj", OBJ),
        ("a.obj", "\ufeff" + OBJ),
        ("infinity.obj", OBJ.replace("o info", "o nan inf\nusemtl finance nan")),
        ("a.ply", PLY.replace("ply\n", "ply\ncomment made by nanoscan inf\n", 1)),
        ("a.ply", PLY.replace("\n", "\r")),
    ],
)
def test_a_valid_file_is_accepted(tmp_path, name, content):
    check_mesh_file(write(tmp_path, name, content))


def test_a_large_file_is_checked_within_seconds(tmp_path):
    path = write(tmp_path, "a.obj", "v 0.123456 0.123456 0.123456\n" * 200_000)
    start = time.perf_counter()
    check_mesh_file(path)
    assert time.perf_counter() - start < 1
