"""pip (Makefile), conda (environment.yml) and the lock (constraints.txt) describe one environment, with every import."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
LOCK = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
FOR_BENCHMARKS = {"peers"}  # what `bench swarm` measures k25lite against, where it is installed
EXTRAS = PROJECT["optional-dependencies"].keys() - FOR_BENCHMARKS
DIRECT = [Requirement(line) for extra in sorted(EXTRAS) for line in PROJECT["optional-dependencies"][extra]]
DIRECT += [Requirement(line) for line in PROJECT["dependencies"]]

CONDA_PYTHON = next(
    SpecifierSet(dependency.removeprefix("python"))
    for dependency in CONDA["dependencies"]
    if isinstance(dependency, str) and dependency.startswith("python")
)
PYTHONS = [f"3.{minor}" for minor in range(40) if CONDA_PYTHON.contains(f"3.{minor}")]


def pip_section() -> list[str]:
    (section,) = (dependency["pip"] for dependency in CONDA["dependencies"] if isinstance(dependency, dict))
    return section


def extras(text: str) -> set[str]:
    """The extras of the one place where `.[a,b]` is installed."""
    (found,) = re.findall(r"--editable '?\.\[([\w,]+)\]", text)
    return set(found.split(","))


def pins(name: str, python: str) -> list[Version]:
    """The exact versions that the lock holds a package to, under one Python on Linux."""
    environment = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    applying = [
        line
        for line in LOCK
        if canonicalize_name(line.name) == canonicalize_name(name)
        and (line.marker is None or line.marker.evaluate(environment))
    ]
    return [Version(part.version) for line in applying for part in line.specifier if part.operator == "=="]


def test_the_lock_holds_nothing_but_exact_versions():
    loose = [str(line) for line in LOCK if not re.fullmatch(r"==[^*]+", str(line.specifier))]
    assert LOCK
    assert not loose


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_every_direct_dependency_has_one_pin_within_its_range_for_each_python(requirement):
    for python in PYTHONS:
        (pin,) = pins(requirement.name, python)
        assert requirement.specifier.contains(pin), f"{pin} under Python {python} is outside {requirement}"


def test_torch_is_2_13_0_in_the_lock_and_the_first_package_that_conda_asks_pip_for():
    assert {str(pin) for python in PYTHONS for pin in pins("torch", python)} == {"2.13.0"}
    packages = [line for line in pip_section() if not line.startswith("--constraint")]
    assert packages[0] == "torch==2.13.0"


def test_conda_offers_the_pythons_of_the_project_up_to_the_last_one_it_is_locked_for():
    required = SpecifierSet(PROJECT["requires-python"])
    assert len(PYTHONS) >= 2
    assert all(required.contains(python) for python in PYTHONS)
    assert set(required) <= set(CONDA_PYTHON)  # every bound of the project's, and an upper one at least
    assert any(part.operator == "<" for part in CONDA_PYTHON)


def test_conda_leaves_everything_but_python_and_pip_to_pip_under_the_lock():
    assert CONDA["name"] == PROJECT["name"]
    assert CONDA["channels"] == ["conda-forge"]
    assert [re.match(r"\w+", d)[0] for d in CONDA["dependencies"] if isinstance(d, str)] == ["python", "pip"]
    options = [line for line in pip_section() if line.startswith("--")]
    assert options[0] == "--constraint constraints.txt"  # a path beside environment.yml, where conda runs pip
    assert len(options) == 2


def test_make_and_conda_install_every_extra_but_those_for_benchmarks():
    makefile = (ROOT / "Makefile").read_text()
    assert extras(makefile) == EXTRAS
    assert extras("\n".join(pip_section())) == EXTRAS
    assert set(re.findall(r"--extra (\w+)", makefile)) == EXTRAS  # of `make lock`
    assert PROJECT["optional-dependencies"].keys() >= FOR_BENCHMARKS


def imported(tree: ast.AST) -> set[str]:
    """The top-level packages that a module, or a part of it, imports from elsewhere."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"k25lite"}


def test_what_the_library_imports_is_declared_and_what_only_an_extra_brings_is_imported_where_it_is_used():
    """But for the peers of `bench swarm`, which live in an environment of their own."""
    required = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    declared = required | {canonicalize_name(requirement.name) for requirement in DIRECT}
    distributions, undeclared = packages_distributions(), []
    for path in sorted(ROOT.glob("k25lite/**/*.py")):
        if path.name == "bench_peers.py":
            continue
        for node in ast.parse(path.read_text()).body:
            allowed = declared if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else required
            for name in imported(node):
                brought_by = {canonicalize_name(each) for each in distributions.get(name, [name])}
                if not brought_by & allowed:
                    undeclared.append(f"{path.relative_to(ROOT)}: {name}")
    assert undeclared == []
