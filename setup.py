"""What setuptools cannot say in pyproject.toml: the kernels are compiled into a wheel, and a build knows its commit."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
COMMIT = Path("server/commit.txt")  # read by server/version.py; not in git, as a commit cannot name itself


def write_commit(folder: Path) -> None:
    """Note which commit is being built. In a source archive it is noted already; elsewhere it may be unknown."""
    noted = ROOT / COMMIT
    if noted.exists():
        text = noted.read_text()
    else:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return
    target = folder / COMMIT
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


class BuildPy(build_py):
    """Copies the packages, then compiles the kernels beside them; an editable installation builds its own."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            write_commit(Path(self.build_lib))
            self.compile_kernels()

    def compile_kernels(self) -> None:
        """Every instruction set of this kind of machine. A build without a compiler or torch makes a wheel without."""
        sys.path.insert(0, str(ROOT))
        from model.backends.cpu.kernels import build

        folder = Path(self.build_lib) / "model" / "backends" / "cpu" / "kernels" / build.PREBUILT.name
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier build of other sources left
        try:
            build.build_all(folder)
        except build.BuildError as error:
            self.warn(f"this wheel has no native kernels: {error}")


class SourceArchive(sdist):
    """The source archive, with its commit."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir))


class Wheel(bdist_wheel):
    """Named for the machine, and for any Python: the kernels know torch, not Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Native(Distribution):
    """A distribution whose files depend on the machine."""

    def has_ext_modules(self) -> bool:
        return True


setup(distclass=Native, cmdclass={"build_py": BuildPy, "sdist": SourceArchive, "bdist_wheel": Wheel})
