"""python release/check_wheel.py FOLDER: whether the wheel there has all that a user without a compiler needs."""

import platform
import sys
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parent.parent
KERNELS = "model/backends/cpu/kernels"
SETS = ("avx512", "avxvnni", "avx2", "portable") if platform.machine() == "x86_64" else ("portable",)
PAGE = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "server" / "page").rglob("*")) if path.is_file()]
NEEDED = [
    "server/commit.txt",
    "server/http/routes/docs.html",
    *PAGE,
    f"{KERNELS}/csrc/kernels.cpp",
    "weights/bundled/infinity-stories/model.safetensors",
    "weights/bundled/topk-stories/model.safetensors",
    "weights/bundled/soft-stories/model.safetensors",
]


def missing(wheel: Path) -> list[str]:
    """What should be in the wheel and is not."""
    names = ZipFile(wheel).namelist()
    lost = [name for name in NEEDED if name not in names]
    return lost + [s for s in SETS if not any(name.startswith(f"{KERNELS}/prebuilt/{s}-") for name in names)]


def main(folder: Path) -> None:
    """Say what was built; end with an error where something is missing."""
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    if lost := missing(wheel):
        sys.exit(f"{wheel}: it lacks {', '.join(lost)}")
    for path in (archive, wheel):
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
