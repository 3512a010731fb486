"""What the package puts where: the public surface, the rooms behind their symlinks, the wheel and the sdist."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import attnctl

ROOT = Path(__file__).parent.parent
ROOMS = ("processors", "pipelines", "demos")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", **environment},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


# --- surface ----------------------------------------------------------------------------------------------------------


def test_surface_is_what_the_design_says():
    functions = {"attach", "load", "register", "select", "sites", "tokens"}
    assert set(dir(attnctl)) == functions | {"AttnctlError", "Control", "Lane", "__version__"} | {
        "batch",
        "pipelines",
        "processors",
    }
    assert all(getattr(attnctl, name) is not None for name in dir(attnctl))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        attnctl.nothing  # noqa: B018


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    script = (
        "import attnctl, sys; print(sorted({'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    assert run(sys.executable, "-c", script, cwd=tmp_path) == "[]\n"


def test_a_script_beside_the_checkout_finds_the_installed_package(tmp_path):
    """The checkout is a folder named attnctl, too, but no package. (`pip install -e` is not helped by that: its finder
    comes after every folder on the path.)"""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/attnctl").symlink_to(ROOT / "attnctl")
    (tmp_path / "above").mkdir()
    (tmp_path / "above/attnctl").symlink_to(ROOT)
    (tmp_path / "above/script.py").write_text("import attnctl; print(attnctl.__file__, attnctl.__version__)")
    said = run(sys.executable, "script.py", cwd=tmp_path / "above", PYTHONPATH=str(tmp_path / "site"))
    assert said == f"{tmp_path}/site/attnctl/__init__.py {attnctl.__version__}\n"


def test_version_has_one_source():
    assert version("attnctl") == attnctl.__version__


# --- rooms ------------------------------------------------------------------------------------------------------------


def test_rooms_are_not_importable_from_the_top(tmp_path):
    script = f"from importlib.util import find_spec; print([name for name in {ROOMS} if find_spec(name)])"
    assert run(sys.executable, "-c", script, cwd=tmp_path) == "[]\n"


@pytest.mark.parametrize("room", ROOMS)
def test_room_is_reached_through_its_symlink(room):
    assert (ROOT / "attnctl" / room).is_symlink()
    assert (ROOT / "attnctl" / room).resolve() == ROOT / room


def test_every_package_is_listed():
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("attnctl", *(f"attnctl/{room}" for room in ROOMS))
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert sorted(found) == PROJECT["tool"]["setuptools"]["packages"]


# --- requirements -----------------------------------------------------------------------------------------------------


def test_constraints_pin_every_direct_dependency_within_its_range():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *(one for extra in extras.values() for one in extra)]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), text


def test_readme_has_two_set_up_commands_of_one_line_each():
    section = re.search(r"^## Set up$(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert section is not None
    blocks = re.findall(r"^```sh\n(.*?)^```$", section[1], re.DOTALL | re.MULTILINE)
    assert [block.count("\n") for block in blocks] == [1, 1]
    first, second = blocks
    assert first.startswith("python3 -m venv .venv && ") and "generate" in first
    assert "[test]" in second and "pytest" in second


# --- wheel and sdist --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist, wheel of the sdist) of a copy of this tree to which a model was added."""
    base = tmp_path_factory.mktemp("build")
    tree = base / "tree"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out", "runs")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=unwanted)
    model = tree / "attnctl/glyph/models/probe"
    (model / "unet").mkdir(parents=True)
    for name in ("model_index.json", "unet/weights.safetensors", "README.md", "merges.txt"):
        (model / name).write_text("{}")
    build = "import setuptools.build_meta as backend, sys; print(getattr(backend, 'build_' + sys.argv[1])(sys.argv[2]))"

    def make(kind: str, source: Path, target: str) -> Path:
        said = run(sys.executable, "-c", build, kind, base / target, cwd=source)
        return base / target / said.splitlines()[-1]

    wheel, sdist = make("wheel", tree, "one"), make("sdist", tree, "two")
    with tarfile.open(sdist) as archive:
        archive.extractall(base / "unpacked", filter="data")
    (again,) = (base / "unpacked").iterdir()
    return wheel, sdist, make("wheel", again, "three")


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_beside_it(built):
    wheel, _, _ = built
    tops = {name.split("/")[0] for name in names(wheel)}
    assert tops == {"attnctl", f"attnctl-{attnctl.__version__}.dist-info"}
    probe = "attnctl/glyph/models/probe/"
    wanted = [probe + "model_index.json", probe + "unet/weights.safetensors", probe + "README.md", probe + "merges.txt"]
    wanted += ["attnctl/py.typed", *(f"attnctl/{room}/__init__.py" for room in ROOMS)]
    wanted += [f"attnctl-{attnctl.__version__}.dist-info/licenses/{name}" for name in ("LICENSE", "NOTICE")]
    assert set(wanted) <= set(names(wheel))
    rooms = {path: f"attnctl/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*")}
    ours = {path: str(path.relative_to(ROOT)) for path in (ROOT / "attnctl").rglob("*")} | rooms
    expected = {name for path, name in ours.items() if path.is_file() and "__pycache__" not in name}
    assert {name for name in names(wheel) if name.startswith("attnctl/") and not name.startswith(probe)} == expected


@pytest.mark.slow
def test_sdist_holds_no_symlink_and_builds_the_same_wheel(built):
    wheel, sdist, again = built
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        inside = {member.name.partition("/")[2] for member in archive}
    assert {"processors/__init__.py", "constraints.txt", "tests/test_packaging.py"} <= inside
    assert not [name for name in inside if name.startswith(tuple(f"attnctl/{room}" for room in ROOMS))]
    assert names(wheel) == names(again)


@pytest.mark.slow
def test_installed_wheel_imports_by_its_own_names_alone(built, tmp_path):
    wheel, _, _ = built
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "from importlib.util import find_spec; import attnctl, attnctl.demos, attnctl.pipelines, attnctl.processors\n"
        f"print(attnctl.__file__, attnctl.processors.__file__, [name for name in {ROOMS} if find_spec(name)])"
    )
    site = tmp_path / "site"
    said = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(site))
    assert said == f"{site}/attnctl/__init__.py {site}/attnctl/processors/__init__.py []\n"
