"""The house: imports point one way, and the package is what the wheel holds."""

import ast
import importlib
import re
import shutil
import subprocess
import sys

import pytest
from rooms import PAGE, ROOT, drawn, imports_of, reduced, rooms, with_drawing

# A room may import itself, `errors`, and what stands here.
MAY_KNOW = {
    "errors": set(),
    "registry": set(),
    "files": set(),
    "logs": {"compat", "files"},
    "finite": set(),
    "compat": set(),
    "extend": {"data", "distillation", "evaluation", "federated", "registry"},
    "distillation": {"registry"},
    "optim": set(),
    "data": {"compat", "files", "registry"},
    "model": {"data", "distillation", "optim", "registry", "splitmix"},
    "federated": {"distillation", "finite", "model", "optim", "registry", "splitmix"},
    "engine": {"distillation", "data", "federated", "finite", "model", "optim"},
    "privacy": {"federated", "registry"},
    "evaluation": {"data", "finite"},
    "config": {"registry", "compat", "distillation", "engine", "evaluation", "federated", "model", "optim", "privacy"},
    "checkpoint": {"config", "files"},
    "rounds": set(),
    "limits": {"config"},
    "federation": {"compat", "data", "engine", "federated", "files", "model", "privacy"},
    "machines": {
        "checkpoint",
        "config",
        "data",
        "engine",
        "evaluation",
        "federated",
        "federation",
        "files",
        "finite",
        "limits",
        "model",
        "privacy",
        "record",
        "registry",
        "rounds",
    },
    "trainer": {
        "compat",
        "federation",
        "machines",
        "network",
        "rounds",
        "limits",
        "logs",
        "checkpoint",
        "data",
        "engine",
        "evaluation",
        "federated",
        "files",
        "finite",
        "model",
        "optim",
    },
    "telling": {"data", "evaluation", "model", "privacy", "result", "trainer"},
    "result": {"data", "evaluation", "federated", "rounds", "trainer"},
    "strangers": {"checkpoint", "data", "engine", "evaluation", "federated", "federation", "trainer"},
    "quick_start": {
        "federation",
        "result",
        "rounds",
        "limits",
        "checkpoint",
        "compat",
        "config",
        "data",
        "engine",
        "evaluation",
        "federated",
        "files",
        "logs",
        "model",
        "record",
        "strangers",
        "telling",
        "trainer",
    },
    "splitting": {"compat", "config", "data", "files", "machines", "quick_start"},
    "auditing": {"checkpoint", "config", "data", "engine", "federated", "files", "privacy", "quick_start", "report"},
    "cost": {"config", "data", "files", "limits", "network", "quick_start", "record"},
    "record": {"federated", "files"},
    "splitmix": set(),
    "network": set(),
    "report": {"checkpoint", "config", "files", "network", "record"},
    "experiment": {"checkpoint", "compat", "config", "files", "quick_start", "record", "report"},
    "recommend": {"compat", "data", "distillation", "engine", "federated", "files", "model", "quick_start"},
    "search": {"config", "files", "quick_start"},
    "command_line": {
        "compat",
        "config",
        "cost",
        "data",
        "experiment",
        "files",
        "logs",
        "model",
        "quick_start",
        "recommend",
        "registry",
        "report",
        "search",
        "telling",
        "machines",
        "network",
        "splitting",
        "auditing",
    },
}
# Rooms of pure mathematics know no recommender library.
TORCH_ONLY = {"distillation", "optim"}
VAGUE = {"each", "found", "place", "told"}


def test_every_room_is_in_the_law():
    assert rooms().keys() == MAY_KNOW.keys()


@pytest.mark.parametrize("room", MAY_KNOW)
def test_imports_point_downwards(room):
    for file in rooms()[room]:
        for name in imports_of(file):
            if name.startswith("recbole_fedkd."):
                target = name.split(".")[1]
                known = MAY_KNOW[room] | {room, "errors", "__version__"}
                assert target in known, f"{file.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", sorted(TORCH_ONLY))
def test_mathematics_knows_torch_only(room):
    for file in rooms()[room]:
        for name in imports_of(file):
            assert name.split(".")[0] in {
                "abc",
                "dataclasses",
                "torch",
                "math",
                "logging",
                "collections",
                "functools",
                "typing",
                "__future__",
                "recbole_fedkd",
            }


def test_the_law_has_no_circle():
    def reachable(room, seen=()):
        assert room not in seen, f"circle through {room}"
        for below in MAY_KNOW[room]:
            reachable(below, (*seen, room))

    for room in MAY_KNOW:
        reachable(room)


def test_the_picture_of_the_house_is_that_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    assert with_drawing(page) == page, "python tests/rooms.py draws it anew"
    assert "federation --> engine" in drawn() and "engine --> federation" not in drawn()


def test_an_arrow_that_follows_from_others_is_not_drawn():
    assert reduced({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}


def test_whatever_the_page_of_the_house_names_is_there():
    named = re.findall(r"`((?:\w+\.)+\w+)`", PAGE.read_text(encoding="utf-8").partition("## One interaction")[2])
    assert len(named) > 15
    for name in named:
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(["recbole_fedkd", *parts[:length]]))
            except ModuleNotFoundError:
                continue
            break
        for attribute in parts[length:]:
            assert hasattr(found, attribute), name
            found = getattr(found, attribute)


def test_no_file_is_too_long_to_be_read_at_once():
    assert not [
        str(file) for file in (ROOT / "recbole_fedkd").rglob("*.py") if len(file.read_text().splitlines()) > 450
    ]


def named(tree):
    """Line and name of every variable, parameter and attribute that a file gives a value, in the order of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def vague_names(file):
    """A sentence for every name of a file that says nothing of what it holds."""
    return [
        f"{file.relative_to(ROOT)}, line {line}: '{name}' may be anything; name it after what it holds"
        for line, name in sorted(named(ast.parse(file.read_text(encoding="utf-8"))))
        if name in VAGUE
    ]


@pytest.mark.parametrize("folder", ["recbole_fedkd", "benchmarks", "docs/plugins"])
def test_names_say_what_they_hold(folder):
    sentences = [sentence for file in sorted((ROOT / folder).rglob("*.py")) for sentence in vague_names(file)]
    assert not sentences, "\n".join(sentences)


def test_recboles_quick_start_and_its_ray_are_never_imported():
    unwanted = ("ray", "pkg_resources", "recbole.quick_start")
    code = f"import sys, recbole_fedkd.quick_start; print([name for name in {unwanted} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_a_wheel_holds_the_properties_and_runs_from_any_folder(tmp_path):
    source = tmp_path / "source"
    leftovers = shutil.ignore_patterns("build", "*.egg-info", ".*", "saved", "log*", "dataset")
    shutil.copytree(
        ROOT, source, ignore=lambda folder, names: leftovers(folder, names) if folder == str(ROOT) else set()
    )
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path / "wheel"), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    shipped = {path.relative_to(site / "recbole_fedkd" / "properties") for path in site.rglob("properties/**/*.yaml")}
    assert shipped == {path.relative_to(ROOT / "properties") for path in (ROOT / "properties").rglob("*.yaml")}
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import recbole_fedkd.config.files as f, recbole_fedkd.config as c;"
        f"assert f.PROPERTIES.is_relative_to({str(site)!r}), f.PROPERTIES;"
        "print(c.FedKDConfig('AttnFedKD', 'ml-100k')['strategy'])"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "afd"


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- test command -->\s*```bash\n(.+?)\n```", readme, re.S)
    assert block is not None
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
    assert "pytest" in block[1] or "make check" in block[1]
