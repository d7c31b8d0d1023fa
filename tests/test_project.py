"""Rules of the project: import directions, names, light configuration, correct documents."""

import ast
import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import distributed

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "measnet": {"measnet"},
    "shards": {"shards"},
    "distributed": {"distributed", "measnet", "shards"},
    "tune": {"tune", "distributed", "measnet", "shards"},
}
"""Package -> the packages that it may import."""
CONFIGURATION = (
    "measnet.config",
    "shards.config",
    "distributed.config",
    "distributed.presets",
)
HEAVY = ("torch", "ray", "deepspeed", "mlflow", "numpy")
DOCUMENTS = sorted(
    path for place in (ROOT, ROOT / "docs", ROOT / "deploy") for path in place.glob("*.md")
)
NAMING = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]
"""Documents of the present state."""
MLFLOW_TAGS = {"measnet.search"}
"""Names in documents that look like a module."""


def imported(path: Path) -> set[str]:
    """First names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_in_one_direction(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        foreign = (imported(path) & PACKAGES.keys()) - PACKAGES[package]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_hold_a_docstring_only(package: str) -> None:
    """joblib and others import packages by name; that must be cheap."""
    (only,) = ast.parse((ROOT / package / "__init__.py").read_text()).body
    assert isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_where_its_modules_belong(package: str) -> None:
    (only,) = ast.parse((ROOT / package / "__init__.py").read_text()).body
    assert isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant)
    modules = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    named = set(re.findall(r"\w+", str(only.value.value)))
    assert not modules - named, f"add {modules - named} to {package}/__init__.py"


def test_distributed_is_ours_and_not_that_of_dask() -> None:
    assert distributed.__file__ and Path(distributed.__file__).parent == ROOT / "distributed"
    command = [sys.executable, "-c", "import distributed; print(distributed.__file__)"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).parent == ROOT / "distributed"


@pytest.mark.parametrize("module", CONFIGURATION)
def test_configuration_imports_nothing_heavy(module: str) -> None:
    """So that a wrong field is reported in a fraction of a second."""
    program = (
        f"import sys, {module}\n"
        f"sys.exit(' '.join(name for name in {HEAVY!r} if name in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{module} imports {done.stderr.strip()}"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_hides_a_library(package: str) -> None:
    taken = sys.stdlib_module_names | {"deepspeed", "mlflow", "webdataset", "ray", "torch"}
    names = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    assert not names & (taken - {"inspect"})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_the_documentation_exist(path: Path) -> None:
    text = path.read_text()
    for module in set(re.findall(r"python3? -m ((?:measnet|shards|distributed|tune)[\w.]*)", text)):
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin, f"{path.name} names {module}"
        source = Path(spec.origin).read_text()
        assert 'if __name__ == "__main__":' in source, f"{module} is no command"
    rules = re.findall(r"^([\w./-][\w./ -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    for target in set(re.findall(r"(?:^|`)make ([\w./-]+)", text, re.MULTILINE)):
        assert target in targets, f"{path.name} names make {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_in_the_documentation_exist(path: Path) -> None:
    for link in re.findall(r"\]\((?!https?://|#)([^)\s#]+)", path.read_text()):
        assert (path.parent / link).exists(), f"{path.name} links to {link}"


@pytest.mark.parametrize("path", NAMING, ids=lambda path: path.name)
def test_code_named_in_the_documentation_exists(path: Path) -> None:
    text = path.read_text()
    for name in set(re.findall(r"`((?:measnet|shards|distributed|tune)(?:\.\w+)+)", text)):
        if name not in MLFLOW_TAGS:
            pkgutil.resolve_name(name)
    files = {file.as_posix() for file in ROOT.glob("[a-z]*/**/*.py")}
    for name in set(re.findall(r"`([\w./]+\.py)\b", text)):
        assert "NAME" in name or any(file.endswith(f"/{name}") for file in files), name


def test_tests_named_in_documents_and_internals_exist() -> None:
    tests = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    known = {name for text in tests for name in re.findall(r"\bdef (test_\w+)", text)}
    known |= {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in [*NAMING, *(ROOT / "distributed" / "internals").glob("*.py")]:
        named = set(re.findall(r"\b(test_\w+)\b(?!\*)", path.read_text()))
        assert named <= known, f"{path.name} names {sorted(named - known)}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("folder", [*PACKAGES, "tests", "bench"])
def test_no_file_is_too_long(folder: str) -> None:
    lines = {p.name: len(p.read_text().splitlines()) for p in (ROOT / folder).rglob("*.py")}
    assert not {name: count for name, count in lines.items() if count > 500}


PUBLIC_SPELLED_AS_PRIVATE = {"_replace", "_asdict", "_fields", "_exit", "_current_frames"}
"""Documented names: of named tuples, of `os` and of `sys`."""
SPELLED_AS_PUBLIC = {"enable_backward_allreduce", "grad_position"}
"""Names of other libraries that are not part of their documented interface."""
PRIVATE_TEXTS = re.compile(
    r"RAY_TRAIN_|RAY_JOB_CONFIG|\bds_(id|shape|numel|tensor)\b|torch\._dynamo|inspect\.unwrap"
)


def names_of_others(tree: ast.Module, own: set[str]) -> set[str]:
    """Private names in a module that this project does not define itself."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            paths = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found |= {part for path in paths for part in path.split(".")}
    private = {n for n in found if n.startswith("_") and not n.startswith("__")}
    return (private - own - PUBLIC_SPELLED_AS_PRIVATE) | (found & SPELLED_AS_PUBLIC)


def test_private_names_of_other_libraries_have_one_place() -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    trees = {path: ast.parse(path.read_text()) for path in files}
    own = {path.stem for path in files} | {"_pixels", "_jpeg", "_apply"}
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
        elif isinstance(node, ast.arg):
            own.add(node.arg)
    for path, tree in trees.items():
        if "internals" not in path.parts and path.name != "internals.py":
            private = names_of_others(tree, own)
            assert not private, f"{path.relative_to(ROOT)} uses {sorted(private)}"
            texts = PRIVATE_TEXTS.findall(path.read_text())
            assert not texts, f"{path.relative_to(ROOT)} names {texts}"


def test_a_private_name_of_another_library_is_found() -> None:
    code = "import ray._private.services\ntorch._foreach_add_(a, b)\nfrom x import _hidden"
    found = names_of_others(ast.parse(code), own={"_mine"})
    assert found == {"_private", "_foreach_add_", "_hidden"}
