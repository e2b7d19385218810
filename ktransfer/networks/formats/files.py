"""Files that are no checkpoints though they are named like ones: recognised by what they hold, with the way out."""

import zipfile
from pathlib import Path

from ktransfer.errors import UsageError

_LFS = b"version https://git-lfs"
_MARKS = (
    (b"\x89HDF\r\n", "an HDF5 file, as Keras saves; give the weights as a file of torch or safetensors"),
    (b"GGUF", "a GGUF file; give the weights as safetensors"),
)
_START = 512


def refuse_others(path: Path) -> None:
    """Nothing, where a file may be a checkpoint.

    Raises:
        UsageError: it is none: a pointer of Git LFS, a web page, a program of torch.export, a file of another library.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(_START)
    if not start:
        raise UsageError(f"{path}: an empty file; download it again")
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise UsageError(f"{path}: cut off, its end is missing; download it again")
    if start.startswith(_LFS):
        raise UsageError(f"{path}: only a pointer of Git LFS, not the weights; fetch them with git lfs pull")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        raise UsageError(
            f"{path}: a web page, not weights: what was saved is the page of a link, or of an error; download the file "
            "itself again"
        )
    if text.startswith(b"{") and b"\0" not in start:  # a safetensors file begins with any byte, and soon has a zero
        raise UsageError(f"{path}: a JSON text, not weights; give the file of the weights itself, or its folder")
    for mark, what in _MARKS:
        if start.startswith(mark):
            raise UsageError(f"{path}: {what}")
    if start.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        lasts = {name.rpartition("/")[2] for name in names}
        if lasts & {"archive_format", "serialized_exported_program.json"}:
            raise UsageError(
                f"{path}: a program of torch.export, whose layers have no names any more; where it was made, save the "
                "weights of the module: torch.save(model.state_dict(), FILE)"
            )
        if "data.pkl" not in lasts and any(name.endswith(".npy") for name in names):
            raise UsageError(f"{path}: arrays of numpy; features made elsewhere are for cluster --features FILE --keys")


def is_safetensors(path: Path) -> bool:
    """Whether a file is one of safetensors, whatever its name: the length of a JSON text, and the text."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < 2**32
