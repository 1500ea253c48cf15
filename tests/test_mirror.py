"""The tests are laid out as the code is: who changes a package finds its tests in the folder of the same path."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
CODE = ("server", "engine", "weights", "model", "terminal", "training", "calibration", "benchmarks")
SCENARIOS = {"e2e", "clients", "more_clients", "new_kind", "page"}  # whole servers or engines, whatever is at fault
FILES = {"deploy"}  # tests of files that are no code of a package
ELSEWHERE = {  # packages whose tests are in another folder, and why
    "model/families": "families",  # one set of tests for every family, against transformers
    "weights/families": "families",  # the same tests load the checkpoints
    "model/backends": "engine/test_build.py",  # it chooses what the engine runs
    "benchmarks/layers": "benchmarks/test_figures.py",
}


def packages() -> set[str]:
    """Every folder with code of its own."""
    files = (file for name in CODE for file in (ROOT / name).rglob("*.py") if file.name != "__init__.py")
    return {file.parent.relative_to(ROOT).as_posix() for file in files}


def test_every_package_has_tests_of_its_name() -> None:
    for package in packages() - set(ELSEWHERE):
        folder = TESTS / package
        beside = folder.with_name(f"test_{folder.name}.py")
        assert beside.exists() or any(folder.glob("test_*.py")), f"{package} has no tests in tests/{package}"


def test_every_folder_of_tests_is_a_packages() -> None:
    folders = {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")} - {"."}
    assert folders - SCENARIOS - FILES - set(ELSEWHERE.values()) <= packages()


def test_what_is_said_to_be_elsewhere_is_there() -> None:
    assert set(ELSEWHERE) <= packages()
    assert all((TESTS / place).exists() for place in ELSEWHERE.values())
    assert all((TESTS / folder).is_dir() for folder in SCENARIOS | FILES)
