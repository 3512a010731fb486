"""Inversions on the disk, so that another program, or the same one tomorrow, need not make them again.

    cache = InversionCache(usual_folder(), weights)
    composer = PrimeComposer(pipe, cache=cache)

A file holds one inversion, bit for bit. Its name is a hash of the picture, of all settings that inversions depend on,
and of the model's weights. When the files take more room than they may, those that were not used for longest go.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

FORM = 1
"""Part of each name; another number once inversions are made in another way."""
MOST = 2**30
"""Bytes that the files of a folder take at most, unless somebody says it."""


def usual_folder() -> Path:
    """Where the variable ATTNCTL_CACHE says; else the user's folder for caches (XDG base directory specification)."""
    if own := os.environ.get("ATTNCTL_CACHE"):
        return Path(own) / "inversions"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "attnctl" / "inversions"


class InversionCache:
    """A folder of inversions.

    Args:
        folder: made if need be; one that cannot be written keeps nothing.
        weights: names the model: inversions of other weights are others.
        most: bytes that all files together take at most.
    """

    def __init__(self, folder: Path, weights: str, most: int = MOST) -> None:
        self.folder, self.weights, self.most = folder, weights, most

    def _file(self, name: str) -> Path:
        return self.folder / f"{sha256(f'{FORM} {name} {self.weights}'.encode()).hexdigest()[:40]}.safetensors"

    def get(self, name: str) -> list[Tensor] | None:
        """The inversion of this name, latents at each node on the CPU; None if it is not there, or not whole."""
        path = self._file(name)
        try:
            found = load_file(path)["path"]
            os.utime(path)  # it is used
        except (OSError, SafetensorError, KeyError):
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        return list(found)

    def put(self, name: str, path: list[Tensor]) -> None:
        """Keep an inversion; it appears whole or not at all."""
        content = save({"path": torch.stack(path).detach().cpu().contiguous()})
        if len(content) > self.most:
            return
        part = self.folder / f".{secrets.token_hex(8)}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
            os.replace(part, self._file(name))
        except OSError:  # a full disk is no reason not to compose
            with suppress(OSError):
                part.unlink(missing_ok=True)
        self._tidy()

    def _tidy(self) -> None:
        with suppress(OSError):
            files = [(one.stat(), one) for one in self.folder.glob("*.safetensors")]
            room = self.most
            for told, file in sorted(files, key=lambda pair: pair[0].st_mtime_ns, reverse=True):
                room -= told.st_size
                if room < 0:
                    file.unlink(missing_ok=True)
