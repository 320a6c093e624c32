"""Download of Google Scanned Objects from a local server with the API of Gazebo Fuel."""

import http.server
import io
import json
import re
import threading
import time
import urllib.parse
import zipfile

import pytest

from data_tools.__main__ import main
from data_tools.assets import gso
from data_tools.assets.archives import ArchiveError, extract
from data_tools.assets.gso import fetch_gso
from data_tools.assets.obj_materials import read_obj_materials
from data_tools.assets.outputs import make_id
from data_tools.assets.scan import KEY_PATTERN, find_assets
from lrm_pl.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "default::DeprecationWarning")

OBJ = b"mtllib model.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl material_0\nf 1 2 3\n"
MTL = b"newmtl material_0\nKd 1 1 1\nmap_Kd texture.png\n"
TEA = "Threshold_Teapot"
LONG = "A" * 90 + " (blue/white)"


def zipped(**changes):
    files = {"meshes/model.obj": OBJ, "meshes/model.mtl": MTL, "materials/textures/texture.png": b"image"}
    files |= {"model.config": b"<model/>", "thumbnails/0.jpg": b"jpg"} | changes
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            if content is not None:
                archive.writestr(name, content)
    return buffer.getvalue()


def models(*names):
    records = [
        {
            "name": name,
            "owner": "GoogleResearch",
            "license_name": "Creative Commons Attribution 4.0 International",
        }
        | {"description": "...", "tags": ["ceramic"], "categories": ["Bottles and Cans and Cups"]}
        for name in names
    ]
    return json.dumps(records).encode()


@pytest.fixture
def fuel(monkeypatch):
    """A server of ``pages`` (path and query -> response); other paths return 404, as after Fuel's last page."""
    monkeypatch.setattr("lrm_pl.storage._MAX_DELAY_S", 0.02)
    monkeypatch.setattr(gso, "PAGE", 2)
    pages, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = urllib.parse.unquote(self.path)
            asked.append((self.command, path))
            self.send_response(200 if path in pages else 404)
            self.send_header("Content-Length", str(len(pages.get(path, b""))))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(pages.get(path, b""))

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        server.pages, server.asked = pages, asked
        server.url = f"http://127.0.0.1:{server.server_port}/1.0/GoogleResearch"
        pages["/1.0/GoogleResearch/models?page=1&per_page=2"] = models(TEA, "Shoe")
        pages["/1.0/GoogleResearch/models?page=2&per_page=2"] = models(LONG)
        for name in (TEA, "Shoe", LONG):
            pages[f"/1.0/GoogleResearch/models/{name}.zip"] = zipped()
        yield server
        server.shutdown()
        thread.join(10)


def fetch(server, out, limit=None):
    fetch_gso(out, limit, server.url)
    return {asset.id: asset for asset in find_assets(out)}


def left_out(out):
    return {
        entry["id"]: entry["reason"]
        for entry in map(json.loads, (out / "left_out.jsonl").read_text().splitlines())
    }


def test_models_of_all_pages_are_unpacked_with_their_textures(fuel, tmp_path):
    found = fetch(fuel, tmp_path)
    assert set(found) == {TEA, "Shoe", make_id(LONG)}
    tea = found[TEA]
    assert (tea.name, tea.license, tea.split) == ("Threshold Teapot", "CC-BY-4.0", "val")
    assert tea.tags == ("Bottles and Cans and Cups", "ceramic")
    assert tea.file == f"{TEA}/model.obj"
    files = {path.name: path.read_bytes() for path in (tmp_path / TEA).iterdir()}
    assert files == {"model.obj": OBJ, "model.mtl": MTL, "texture.png": b"image"}
    assert not (tmp_path / "zips").exists()


def test_a_second_run_downloads_nothing_and_the_limit_selects_by_name(fuel, tmp_path):
    assert set(fetch(fuel, tmp_path, limit=2)) == {make_id(LONG), "Shoe"}
    fuel.asked.clear()
    assert set(fetch(fuel, tmp_path, limit=2)) == {make_id(LONG), "Shoe"}
    assert not [path for _, path in fuel.asked if path.endswith(".zip")]


def needs_version(version):
    """A zip whose last entry requires a later version of the zip format."""
    content = bytearray(zipped())
    content[content.rindex(b"PK\x01\x02") + 6] = version
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            b"<html>busy</html>",
            "not downloaded: .*expected zip, but found a file that starts with '<html>busy",
        ),
        (b"PK and then nothing", "not unpacked: Shoe.zip: expected a zip file, but found"),
        (
            zipped(**{"meshes/model.obj": None}),
            "not unpacked: .*Shoe.zip: expected the file meshes/model.obj, but found none",
        ),
        (zipped(**{"materials/textures/texture.png": None}), "expected the file texture.png, but found none"),
        (zipped(**{"meshes/model.mtl": None}), "expected the file model.mtl, but found none"),
        (
            zipped(**{"meshes/model.mtl": MTL.replace(b"texture", b"../../x")}),
            r"expected the file \.\./\.\./x\.png",
        ),
        (
            zipped().replace(b"image", b"imaga"),
            "materials/textures/texture.png is damaged: Bad CRC",
        ),
        (needs_version(99), "expected a zip file, but found zip file version 9.9"),
    ],
)
def test_an_invalid_model_is_left_out_and_retried_by_the_next_run(fuel, tmp_path, content, reason):
    fuel.pages["/1.0/GoogleResearch/models/Shoe.zip"] = content
    assert set(fetch(fuel, tmp_path)) == {TEA, make_id(LONG)}
    assert re.search(reason, left_out(tmp_path)["Shoe"])
    assert not (tmp_path / "Shoe").exists()
    fuel.pages["/1.0/GoogleResearch/models/Shoe.zip"] = zipped()
    assert "Shoe" in fetch(fuel, tmp_path)
    assert left_out(tmp_path) == {}


def test_a_response_that_is_not_a_model_list_is_rejected(fuel, tmp_path):
    fuel.pages["/1.0/GoogleResearch/models?page=1&per_page=2"] = b"<html>"
    with pytest.raises(
        InputError, match=r"page=1&per_page=2: expected a JSON list of models, but found b'<html>'"
    ):
        fetch(fuel, tmp_path)
    fuel.pages["/1.0/GoogleResearch/models?page=1&per_page=2"] = b"[]"
    with pytest.raises(InputError, match=r"expected a JSON list of models, but found .*the list is empty"):
        fetch(fuel, tmp_path)
    del fuel.pages["/1.0/GoogleResearch/models?page=1&per_page=2"]
    with pytest.raises(InputError, match=r"page=1&per_page=2: the request failed with FileNotFoundError"):
        fetch(fuel, tmp_path)


def test_listing_stops_at_a_repeated_page(fuel, tmp_path):
    fuel.pages["/1.0/GoogleResearch/models?page=3&per_page=2"] = models(LONG)
    assert len(fetch(fuel, tmp_path)) == 3


def test_the_help_states_that_all_objects_are_in_the_validation_split(capsys):
    with pytest.raises(SystemExit):
        main(["fetch", "gso", "--help"])
    assert 'all of them are assigned to the split "val"' in " ".join(capsys.readouterr().out.split())


def test_different_names_have_different_valid_ids():
    names = [LONG, LONG + ".", "a b", "a_b", "a/b", "", "é", "../x"]
    ids = [make_id(name) for name in names]
    assert len(set(ids)) == len(names)
    assert all(KEY_PATTERN.fullmatch(key) for key in ids)
    assert make_id("a_b") == "a_b"


def test_extraction_rejects_paths_outside_the_folder_and_large_files(tmp_path, monkeypatch):
    with zipfile.ZipFile(io.BytesIO(zipped(**{"../evil.obj": b"x", "big": b"0" * 5000}))) as archive:
        for path in ("../evil.obj", "/evil.obj", "a/../../evil.obj", "C:\\evil.obj"):
            with pytest.raises(ArchiveError, match="expected paths inside the folder"):
                extract(archive, {path: "../evil.obj"}, tmp_path)
        monkeypatch.setattr("data_tools.assets.archives.MAX_MODEL_BYTES", 9000)
        with pytest.raises(ArchiveError, match="expected at most 4000 bytes in big, but found 5000"):
            extract(archive, {"a": "big", "b": "big"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_obj_with_many_spaces_is_parsed_within_a_second():
    start = time.monotonic()
    surface = read_obj_materials(b"mtllib a" + b" " * 200_000 + b"x\nusemtl wood \n", lambda name: None)
    assert time.monotonic() - start < 1
    assert surface.missing[0].startswith("a ")
