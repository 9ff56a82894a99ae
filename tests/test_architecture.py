"""The house rules that no reviewer should have to check by hand."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Which rooms a room may import. `prunelle.errors` is everybody's; the scripts and the command line import all.
ALLOWED: dict[str, set[str]] = {
    "losses": set(),
    "compression": set(),
    "tasks": set(),
    "trainers": {"losses", "compression", "tasks"},
    "export": {"tasks", "compression"},
}


def imported(file: Path) -> set[str]:
    """The modules of `prunelle` that a file imports, below the package's name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; write `from prunelle.…`"
            names.add(node.module or "")
    return {name.split(".")[1] for name in names if name.startswith("prunelle.")}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_run_one_way(room: str) -> None:
    """Prevents a loss that needs a trainer, or an export that only works on what was trained here."""
    for file in (ROOT / room).rglob("*.py"):
        assert imported(file) <= ALLOWED[room] | {room, "errors"}, file


def test_torch_is_all_that_losses_need() -> None:
    """Prevents losses that cannot be used in a hand-written loop without the rest of the stack."""
    code = "import sys, prunelle.losses; sys.exit('transformers' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0


def test_scripts_stay_short() -> None:
    """Prevents logic from growing where no test reaches it."""
    for script in (ROOT / "scripts").glob("*.py"):
        assert len(script.read_text().splitlines()) < 80, script


@pytest.mark.parametrize("room", [*ALLOWED, "scripts"])
def test_every_room_is_linked_into_the_package(room: str) -> None:
    """Prevents a copy of a room, or a link that was checked out as text."""
    link = ROOT / "src" / "prunelle" / room
    assert link.is_symlink()
    assert link.resolve() == ROOT / room


def test_links_that_became_text_are_explained(tmp_path: Path) -> None:
    """Prevents a puzzle on Windows, where git writes a link's target into a file instead."""
    package = tmp_path / "prunelle"
    package.mkdir()
    (package / "__init__.py").write_text((ROOT / "src" / "prunelle" / "__init__.py").read_text())
    (package / "losses").write_text("../../losses")
    done = subprocess.run([sys.executable, "-c", "import prunelle"], cwd=tmp_path, capture_output=True, text=True)
    assert "git config core.symlinks true" in done.stderr


def test_the_wheel_built_from_the_sdist_holds_every_room(tmp_path: Path) -> None:
    """Prevents links that are lost on the way to the index: an installed package without its rooms."""
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
        text=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    for room in [*ALLOWED, "scripts"]:
        for file in (ROOT / room).rglob("*.py"):
            assert f"prunelle/{file.relative_to(ROOT)}" in packed
    assert "prunelle/py.typed" in packed
    assert {name.split("/")[0] for name in packed if not name.startswith("prunelle-")} == {"prunelle"}
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import prunelle.losses, prunelle.scripts.distill; print(prunelle.losses.__file__)"
    shown = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert str(tmp_path / "site") in shown.stdout
