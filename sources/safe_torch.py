"""Read what torch.save wrote, and nothing that it would not write.

torch.load(weights_only=True) runs no code of a file, but makes whatever the file asks for. So the
file is looked through first: a short one can unpack to a long one, and the pickle in it can ask for
as much as it likes.
"""

import math
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sources.files import open_regular

LARGEST = 16 << 30  # bytes of a file
STEPS = 1_000_000  # instructions of its pickle, of which a large checkpoint has 50,000
KNOWN = "collections OrderedDict|torch._utils _rebuild_tensor_v2|torch [A-Z][a-z]+Storage"


def load_tensors(path: Path, device: torch.device) -> Any:
    """Tensors in plain containers, out of a file of torch.save. Raises ValueError on anything
    else."""
    try:
        with open_regular(path, LARGEST) as f:
            _check(f)
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # a broken file can raise nearly anything
        raise ValueError(f"{path} holds no tensors that can be read") from e


def _check(f: BinaryIO) -> None:
    """Refuse with a ValueError, or what its parts raise, a file that torch.save would not write."""
    if f.read(4) != b"PK\3\4":
        raise ValueError("no zip file from its first byte on")
    with zipfile.ZipFile(f) as z:
        if any(m.compress_type != zipfile.ZIP_STORED for m in z.infolist()):
            raise ValueError("packed members")
        (name,) = (name for name in z.namelist() if name.endswith("/data.pkl"))
        for n, (code, arg, _) in enumerate(pickletools.genops(z.read(name))):
            # As keys, numbers that are so large may collide, and so may any as places in the memo.
            collides = isinstance(arg, int | float) and 1 << 60 < abs(arg) < math.inf
            if n > STEPS or collides or "PUT" in code.name and arg > n:
                raise ValueError("a pickle that asks for much")
            if code.name.endswith("GLOBAL") and not re.fullmatch(KNOWN, arg):
                raise ValueError("a pickle of more than tensors")
