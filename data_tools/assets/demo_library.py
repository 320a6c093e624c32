"""The command ``python -m data_tools demo-assets``, which creates the demo assets.

The demo assets are 48 OBJ models from the library "Blend Swap CC-0" of the Debian package ``sweethome3d-furniture``.
The authors of the models dedicated them to the public domain. The selection covers many categories and colors and
excludes thin structures and extreme aspect ratios.
"""

import csv
import tempfile
import zipfile
from pathlib import Path

from tqdm import tqdm

from data_tools.assets import furniture_package
from data_tools.assets.scan import TABLE_COLUMNS, TABLE_NAME
from lrm_pl.paths import hash_file

LIBRARY = "BlendSwap-CC-0"
SOURCE = f"{LIBRARY} of the Debian package {furniture_package.PACKAGE} {furniture_package.VERSION}"

OBJECTS = tuple(
    "JapaneseLantern ammoBox antiqueChair armchair augalas bedsideTable2 bootie box bread caballito "
    "cartoon_biplane chair chair2 chairWithCushion chicken childHut coffeeBrewer couch2 cupcake deckChair "
    "desk desklamp drawersCabinet dustbin fireExtinguisher forkLift handbag horse2 kitchenaid lantern "
    "littlePlant lockedLocker lowerCornerCabinet mofx_mailbox motorbike oakTable outdoorLamp plant rock1 "
    "rock3 sofa2 stoneLantern stool2 tableWithTablecloth table_football teddyBear umbrellaFolded woodToy".split()
)

LICENSE_TEXT = """\
The 3D models in this folder come from the library "{library}" ({source}). They were made by the authors named
in {table}, published on blendswap.com, and cleaned and converted to OBJ by Emmanuel Puybaret (eTeks). Here
they were converted to GLB: duplicate faces removed, materials made matte, textures resized to 512 pixels or less.
All of them, these copies included, are dedicated to the public domain under CC0 1.0 Universal:
https://creativecommons.org/publicdomain/zero/1.0/

The library's own license text:

{license}
"""


def make_demo_assets(package: Path, out: Path) -> None:
    """Write 48 GLB files, ``assets.csv`` and ``LICENSE.txt``. The bytes of the files are deterministic.

    Args:
        package: Path of ``sweethome3d-furniture_1.8-1_all.deb``.
        out: Destination folder. Existing files are overwritten.

    Raises:
        PackageError: The package is missing or not the expected version.
    """
    with furniture_package.open_package(package) as folder, tempfile.TemporaryDirectory() as name:
        out.mkdir(parents=True, exist_ok=True)
        library, scratch = folder / f"{LIBRARY}.sh3f", Path(name)
        catalog = furniture_package.read_catalog(library)
        with zipfile.ZipFile(library) as archive:
            archive.extractall(scratch)
        rows = [_convert(catalog[key], scratch, out) for key in tqdm(OBJECTS, unit="object")]
        license = furniture_package.read_license(library)
    with open(out / TABLE_NAME, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, TABLE_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = LICENSE_TEXT.format(library=LIBRARY, source=SOURCE, table=TABLE_NAME, license=license)
    (out / "LICENSE.txt").write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in out.glob("*.glb"))
    print(f"Wrote {len(rows)} objects ({size / 1e6:.1f} MB) to {out}")


def _convert(model: furniture_package.Model, library: Path, out: Path) -> dict[str, str]:
    from data_tools.blender.convert import convert_to_glb  # imports Blender, which is slow

    glb = out / f"{model.key}.glb"
    with tempfile.TemporaryDirectory() as scratch:
        convert_to_glb(library / model.obj, glb, Path(scratch))
    return {
        "id": model.key,
        "name": model.name,
        "creator": model.creator,
        "source": f"{model.key} in {SOURCE}",
        "license": furniture_package.LIBRARIES[LIBRARY],
        "sha256": hash_file(glb),
    }
