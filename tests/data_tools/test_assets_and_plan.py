import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_tools.assets.asset_list import LIST_SCHEMA, Asset, AssetsError, write_list
from data_tools.assets.demo_library import OBJECTS
from data_tools.assets.folder import fetch_folder
from data_tools.assets.scan import TABLE_COLUMNS, assign_ids, find_assets, read_table, scan_folder
from data_tools.rendering.shard_plan import default_held_out, held_out_ids, plan_shards
from lrm_pl.data.schema import KEY_PATTERN
from lrm_pl.paths import hash_file
from tests import ROOT

DEMO_ASSETS = ROOT / "data_tools" / "demo_assets"
HEADER = ",".join(TABLE_COLUMNS) + "\n"


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def test_ids_are_paths_without_suffix_and_invalid_characters():
    files = [Path("chairs/red 1.v2.glb"), Path("A-b_c.OBJ")]
    assert assign_ids(files) == {"chairs_red_1_v2": files[0], "A-b_c": files[1]}


def test_ids_are_unique_for_similar_file_names():
    files = [Path(name) for name in (
        "chair.obj", "chair.ply", "a b.glb", "a_b.glb", "椅子.obj", "桌子.obj", "x" * 90 + ".glb",
        "one.ply", "one_ply.obj",
        "one.obj", "stühle/a.glb",
    )]  # fmt: skip
    named = assign_ids(files)
    assert sorted(named.values()) == sorted(files)
    assert all(KEY_PATTERN.fullmatch(key) for key in named)
    assert {"chair_obj", "chair_ply", "one_obj"} <= named.keys()
    assert assign_ids(reversed(files)) == named


def test_assets_in_subfolders_are_sorted_by_id(tmp_path):
    touch(tmp_path, "b.GLB", "a/z.obj", "a/z.mtl", "c.ply", "d.fbx", "e.gltf", "readme.txt")
    found = find_assets(tmp_path)
    assert [asset.id for asset in found] == ["a_z", "b", "c", "d", "e"]
    assert found[0].file == "a/z.obj"
    assert (found[0].name, found[0].license) == ("a_z", "unknown")


def test_an_empty_or_missing_folder_is_rejected(tmp_path):
    with pytest.raises(AssetsError, match=r"expected glb, gltf, obj, ply, fbx files in .*, but found none"):
        find_assets(tmp_path)
    with pytest.raises(AssetsError, match="found no folder"):
        find_assets(tmp_path / "absent")


def test_assets_csv_provides_metadata_and_is_validated(tmp_path):
    touch(tmp_path, "a.glb")
    table = tmp_path / "assets.csv"
    table.write_text(HEADER + "a,Chair,Ann,library,CC0-1.0,\n")
    found = find_assets(tmp_path)[0]
    assert (found.name, found.creator, found.source, found.license) == ("Chair", "Ann", "library", "CC0-1.0")
    assert found.sha256 == ""
    table.write_text(HEADER + f"a,Chair,Ann,library,CC0-1.0,{'0' * 64}\n")
    assert find_assets(tmp_path)[0].sha256 == "0" * 64
    table.write_text(HEADER + "a,Chair,Ann,library,CC0-1.0,ABC\n")
    with pytest.raises(
        AssetsError, match=r"line 2: expected a sha256 of 64 .* or an empty value, but found 'ABC'"
    ):
        find_assets(tmp_path)
    table.write_text(HEADER.replace("\n", ",up\n") + "a,Chair,Ann,library,CC0-1.0,,z\n")
    with pytest.raises(
        AssetsError, match=r"expected an up axis for OBJ and PLY files only, but found one for 'a'"
    ):
        find_assets(tmp_path)
    table.write_text(HEADER.replace("\n", ",up\n") + "a,Chair,Ann,library,CC0-1.0,,x\n")
    with pytest.raises(
        AssetsError, match="line 2: expected y, z or an empty value as the up axis, but found 'x'"
    ):
        find_assets(tmp_path)
    table.write_text("id,title\na,Chair\n")
    with pytest.raises(AssetsError, match="expected the columns id,name"):
        find_assets(tmp_path)


def test_a_row_without_a_mesh_is_reported(tmp_path, capsys):
    touch(tmp_path, "a.glb", "b.obj")
    (tmp_path / "assets.csv").write_text(HEADER + "b.obj,Chair,Ann,library,CC0-1.0,\na,A,,,,\n")
    assert [asset.name for asset in find_assets(tmp_path)] == ["A", "b"]
    assert "has 1 row whose id does not match any mesh" in (said := capsys.readouterr().err)
    assert "for example, 'b.obj'. An example of a valid id is 'a'" in said


def test_the_objects_with_the_smallest_hashes_are_held_out():
    # sha256 of a, b, c, d begins with ca, 3e, 2e, 18
    assert held_out_ids(["a", "b", "c", "d"], 2) == {"c", "d"}
    assert [default_held_out([""] * n) for n in (1, 5, 6, 47, 48, 1000)] == [0, 0, 1, 7, 8, 8]
    assert default_held_out(["train", "val"] * 50) == 0  # the list defines the splits


def test_shards_contain_consecutive_ids_of_a_split():
    plan = plan_shards(dict.fromkeys("dbeac", ""), held_out=2, shard_size=2)
    assert [(shard.name, shard.ids) for shard in plan] == [
        ("train-000000.tar", ("a", "b")),
        ("train-000001.tar", ("e",)),
        ("val-000000.tar", ("c", "d")),
    ]


def test_listed_splits_are_kept_and_only_other_objects_are_held_out():
    # sha256 of a, b, c, d begins with ca, 3e, 2e, 18
    plan = plan_shards({"a": "val", "b": "", "c": "", "d": "train"}, held_out=1, shard_size=8)
    assert {shard.split: shard.ids for shard in plan} == {"train": ("b", "d"), "val": ("a", "c")}
    with pytest.raises(ValueError, match=r"expected --held-out between 0 and 2 for 2 unassigned assets"):
        plan_shards({"a": "val", "b": "", "c": "", "d": "train"}, held_out=3, shard_size=8)


def test_holding_out_all_objects_is_rejected():
    with pytest.raises(ValueError, match=r"expected --held-out between 0 and 1 .*, but found 2"):
        plan_shards(dict.fromkeys("ab", ""), held_out=2, shard_size=8)


def test_the_demo_assets_are_complete_small_and_in_the_public_domain():
    found = find_assets(DEMO_ASSETS)
    assert all(hash_file(DEMO_ASSETS / asset.file) == asset.sha256 for asset in found)
    assert [asset.id for asset in found] == sorted(OBJECTS)
    assert len(found) == 48
    assert {asset.license for asset in found} == {"CC0-1.0"}
    assert all(asset.creator != "unknown" and asset.name != asset.id for asset in found)
    assert sum(path.stat().st_size for path in DEMO_ASSETS.iterdir()) < 12e6
    held_out = held_out_ids([asset.id for asset in found], 8)
    assert held_out == {"lockedLocker", "littlePlant", "stool2", "box", "rock3", "dustbin", "chair", "desk"}


def listed(folder, **changes):
    asset = dict(id="a", file="a.glb", sha256="", name="A", creator="Ann", source="s", license="CC0-1.0")
    write_list(folder, [Asset(**asset | changes)])


def test_an_asset_list_is_read_back_unchanged(tmp_path):
    touch(tmp_path, "not_listed.glb")
    b = Asset(
        "b", "https://example.org/b.glb", "ab" * 32, "B", "Bo", "x", "CC-BY-3.0", ("chair", "old"), "val"
    )
    a = Asset("a", "sub/a.obj", "", "A", "Ann", "x", "CC0-1.0")
    write_list(tmp_path, [b, a])
    assert find_assets(tmp_path) == (a, b)
    assert (a.is_remote, b.is_remote) == (False, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "../a"}, "expected an id of letters"),
        ({"file": "/etc/a.glb"}, "expected a path inside the folder or a URL, but found '/etc/a.glb'"),
        ({"file": "b/../../a.glb"}, "expected a path inside the folder"),
        ({"file": "a.exe"}, r"expected a file name that ends in one of glb, .*, but found 'a\.exe'"),
        ({"sha256": "00"}, "expected a sha256 or an empty string, but found '00'"),
        ({"split": "test"}, "expected the split"),
    ],
)
def test_an_invalid_field_of_an_asset_list_is_rejected(tmp_path, changes, message):
    listed(tmp_path, **changes)
    with pytest.raises(AssetsError, match=message):
        find_assets(tmp_path)


def test_a_damaged_or_unrelated_parquet_file_is_rejected(tmp_path):
    listed(tmp_path)
    path = tmp_path / "assets.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AssetsError, match="expected a Parquet file"):
        find_assets(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"uid": ["a"]}), path)
    with pytest.raises(
        AssetsError,
        match=r"expected the columns id, file, .* found missing values in id\. Write the list again",
    ):
        find_assets(tmp_path)
    same = {"id": "a", "file": "a.glb", "sha256": "", "name": "", "creator": "", "source": "", "license": ""}
    twice = [same | {"tags": [], "split": "", "up": ""}] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(twice, LIST_SCHEMA), path)
    with pytest.raises(AssetsError, match="expected unique ids, but found 'a' twice"):
        find_assets(tmp_path)


def test_assets_csv_may_have_a_byte_order_mark_and_must_be_utf_8(tmp_path):
    text = "id,name,creator,source,license,sha256\na,Stühle,Ann,library,CC0-1.0,\n"
    table = tmp_path / "assets.csv"
    table.write_text(text, encoding="utf-8-sig")
    assert read_table(table)["a"]["name"] == "Stühle"
    table.write_text(text, encoding="latin-1")
    with pytest.raises(
        AssetsError, match=r"expected a CSV file, but found .*. Save the file as CSV in UTF-8"
    ):
        read_table(table)


def test_the_up_option_is_the_default_for_rows_without_an_up_axis(tmp_path):
    touch(tmp_path, "a.obj", "b.ply")
    (tmp_path / "assets.csv").write_text(HEADER.replace("\n", ",up\n") + "b,,,,,,y\n")
    fetch_folder(tmp_path, None, "z")
    assert [asset.up for asset in find_assets(tmp_path)] == ["z", "y"]


def test_ignored_files_and_links_are_counted(tmp_path, capsys):
    touch(tmp_path, "a.glb", "b/c.stl", "b/d.STL", "e.dae", "pack.zip", ".hidden.glb", "readme.txt", "a.png")
    touch(tmp_path, "__MACOSX/._a.glb", ".cache/old.obj", "._a.glb")
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.glb").symlink_to(tmp_path / "nowhere.glb")
    (tmp_path / "link.glb").symlink_to("a.glb")
    assert [asset.id for asset in scan_folder(tmp_path)] == ["a", "link"]
    said = capsys.readouterr().err
    assert said.startswith("Ignored: ")
    ignored = said.removeprefix("Ignored: ").split(". Only")[0].split(", ")
    assert sorted(ignored) == sorted(
        ["2 .stl", "1 .dae", "1 .zip", "2 linked folders", "2 hidden meshes", "1 dangling link"]
    )


def test_meshes_missing_from_the_asset_list_are_counted(tmp_path, capsys):
    touch(tmp_path, "a.glb", "sub/b.glb", "c.obj", "c.png")
    listed(tmp_path)
    assert [asset.id for asset in find_assets(tmp_path)] == ["a"]
    assert capsys.readouterr().err.startswith(f"Note: assets.parquet does not list 2 meshes in {tmp_path};")
    fetch_folder(tmp_path, None)
    capsys.readouterr()
    assert len(find_assets(tmp_path)) == 3
    assert capsys.readouterr().err == ""


def test_a_folder_is_copied_without_circular_links_dangling_links_and_unrelated_files(tmp_path, capsys):
    mine, out = tmp_path / "mine", tmp_path / "out"
    touch(mine, "chairs/a.obj", "chairs/a.mtl", "chairs/wood.PNG", "LICENSE.txt")
    touch(mine, "scene.blend", "all.zip", ".git/x.png")
    touch(tmp_path, "elsewhere/b.glb")
    (mine / "assets.csv").write_text(HEADER + "chairs_a,Chair,Ann,library,CC0-1.0,\n")
    (mine / "chairs" / "loop").symlink_to(mine)
    (mine / "itself").symlink_to(mine / "itself")
    (mine / "gone.glb").symlink_to(mine / "nowhere.glb")
    (mine / "more").symlink_to(tmp_path / "elsewhere")
    (mine / "target").symlink_to(out)
    fetch_folder(mine, out)
    copied = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert copied == {
        "chairs/a.obj", "chairs/a.mtl", "chairs/wood.PNG", "more/b.glb", "LICENSE.txt", "assets.csv", "assets.parquet"
    }  # fmt: skip
    assert {asset.id: asset.name for asset in find_assets(out)} == {"chairs_a": "Chair", "more_b": "more_b"}
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("Not copied: ")
    for what in ("2 dangling links", "2 circular links", "1 .blend", "1 .zip"):
        assert what in said


def test_listing_a_folder_does_not_open_the_meshes(tmp_path):
    (tmp_path / "a.glb").touch()
    os.truncate(tmp_path / "a.glb", 1 << 40)  # a sparse file; hashing it would take an hour
    assert [(asset.id, asset.sha256) for asset in scan_folder(tmp_path)] == [("a", "")]


def test_a_file_name_that_is_not_utf_8_is_skipped_with_a_warning(tmp_path, capsys):
    touch(tmp_path, "a.glb")
    (tmp_path / os.fsdecode(b"st\xfchle.glb")).touch()
    assert [asset.id for asset in find_assets(tmp_path)] == ["a"]
    assert "not valid UTF-8. Rename the file" in capsys.readouterr().err
