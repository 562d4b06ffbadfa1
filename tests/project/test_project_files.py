"""Workflows and forms of the repository: what must hold of them, whatever else they say."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from hera_trainer.demo import WEIGHT_WHEELS

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
CONSTRAINTS = ROOT / "constraints.txt"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]
# Of the GitHub organisation, of PyPA, and of uv's authors.
TRUSTED = ("actions/", "pypa/", "astral-sh/")


def read(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text())


def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_do_little(path: Path) -> None:
    """Everything may read only, but for jobs that name what more they need; and jobs end."""
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow) >= {"name", True, "jobs"}  # YAML reads the key `on` as true
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 120, name
        granted = job.get("permissions", {})
        assert not granted or name in ("deploy", "publish"), name
        assert "contents" not in granted
    for step in steps(workflow):
        action = step.get("uses")
        if action:
            assert action.startswith(TRUSTED) and re.fullmatch(r"[\w.-]+/[\w./-]+@(v\d+|release/v1)", action), action
            assert not action.startswith("actions/checkout") or step["with"]["persist-credentials"] is False
        else:
            assert "github.event" not in step["run"], "text from outside belongs into an environment variable"


def test_python_versions_are_those_of_the_package() -> None:
    workflow = read(GITHUB / "workflows" / "tests.yml")
    tested = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    classified = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert tested == classified
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert tested[0] == oldest
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")


def test_lowest_and_newest_versions_are_tested_on_purpose() -> None:
    workflow = read(GITHUB / "workflows" / "tests.yml")
    runs = {name: [step.get("run", "") for step in job["steps"]] for name, job in workflow["jobs"].items()}
    assert any("--resolution lowest-direct" in run for run in runs["lowest"])
    steps = [step for step in workflow["jobs"]["newest"]["steps"] if str(step.get("run")).startswith("make ")]
    assert [step["run"].split()[:3] for step in steps] == [
        ["make", n, "CONSTRAINTS="] for n in ("lint", "pytest", "engines")
    ]
    assert [step.get("if") for step in steps] == [None, "always()", "always()"]  # each says what broke
    assert workflow[True]["schedule"] and "workflow_dispatch" in workflow[True]
    assert "schedule" in workflow["jobs"]["newest"]["if"] and "workflow_dispatch" in workflow["jobs"]["newest"]["if"]


def constrained() -> dict[str, Version]:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    for line in lines:  # no address of a registry, no path, no local version
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line), line
    pairs = [line.split("==") for line in lines]
    assert len({canonicalize_name(name) for name, _ in pairs}) == len(pairs)
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_constraints_name_every_dependency_within_its_bounds() -> None:
    """A dependency that is added without its version would be taken as new as it is on that day."""
    versions = constrained()
    extras = PROJECT["optional-dependencies"].values()
    asked = [Requirement(text) for text in (*PROJECT["dependencies"], *(text for extra in extras for text in extra))]
    own = canonicalize_name(PROJECT["name"])
    assert own not in versions
    for requirement in asked:
        name = canonicalize_name(requirement.name)
        assert name == own or versions[name] in requirement.specifier, requirement
    for wheel in map(Requirement, WEIGHT_WHEELS):
        assert versions[canonicalize_name(wheel.name)] in wheel.specifier


def test_make_installs_the_constraints() -> None:
    """As many times as it installs, and again when the file changes; without them it takes the newest."""

    def planned(*arguments: str) -> list[str]:
        command = ["make", "--dry-run", "--always-make", "VENV=environment", *arguments]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return [line for line in run.stdout.splitlines() if "pip install" in line and "-e '.[" in line]

    for target in ("demo", "test", "docs"):
        assert all("PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt " in x for x in planned(target))
        newest = planned(target, "CONSTRAINTS=")
        assert all("CONSTRAINT=" not in line and "--upgrade" in line for line in newest) and len(newest) == 1
    both = [re.search(r"-e '\.\[(\w+)\]'", line)[1] for line in planned("engines")]
    assert both == ["test", "engines"]
    rules = (ROOT / "Makefile").read_text()
    assert len(re.findall(r"^\$\(VENV\)/\.installed-.*\$\(REASONS\)", rules, re.M)) == 2
    assert "constraints.txt" in (GITHUB / "workflows" / "docs.yml").read_text()


def test_engines_are_tested_in_a_step_of_their_own() -> None:
    """`make test` leaves out what `make engines` runs, which nothing else installs DeepSpeed for."""
    rules = (ROOT / "Makefile").read_text()
    assert rules.count('-m "not engines"') == rules.count("-m engines") == 1
    assert "make engines" in (ROOT / ".ci" / "run").read_text()
    workflow = read(GITHUB / "workflows" / "tests.yml")
    assert workflow["jobs"]["engines"]["steps"][-1]["run"] == "make engines"
    extras = PROJECT["optional-dependencies"]
    assert [name for name, asked in extras.items() if any("deepspeed" in text for text in asked)] == ["engines"]


def test_publishing_needs_no_token() -> None:
    workflow = read(GITHUB / "workflows" / "publish.yml")
    job = workflow["jobs"]["publish"]
    assert workflow[True] == {"release": {"types": ["published"]}}
    assert job["environment"]["name"] == "pypi" and job["permissions"] == {"id-token": "write"}
    assert "permissions" not in workflow["jobs"]["build"]  # what is built runs without the right to publish
    assert "secrets." not in (GITHUB / "workflows" / "publish.yml").read_text()
    assert job["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")
    assert job["steps"][-1]["with"]["attestations"] is True


def test_pages_are_built_strictly() -> None:
    workflow = read(GITHUB / "workflows" / "docs.yml")
    assert "mkdocs build --strict" in [step.get("run") for step in workflow["jobs"]["build"]["steps"]]
    deploy = workflow["jobs"]["deploy"]
    assert deploy["permissions"] == {"pages": "write", "id-token": "write"}
    assert deploy["if"] == "github.event_name != 'pull_request'"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms(path: Path) -> None:
    """What GitHub asks of a form: without it, the form is not shown."""
    form = read(path)
    assert form["name"] and form["description"]
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0
    for part in form["body"]:
        assert part["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        attributes = part["attributes"]
        assert attributes["value"] if part["type"] == "markdown" else attributes["label"]
        if part["type"] in ("dropdown", "checkboxes"):
            assert attributes["options"]


def test_reports_of_bugs_carry_versions() -> None:
    for name in ("bug", "model"):
        (part,) = (part for part in read(GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml")["body"] if part.get("id") == "env")
        assert "hera env" in part["attributes"]["label"] and part["validations"]["required"] is True


def test_pre_commit_formats_as_the_tests_check() -> None:
    hooks = [hook["id"] for repo in read(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert {"ruff-check", "ruff-format", "check-yaml", "check-toml", "codespell"} <= set(hooks)
