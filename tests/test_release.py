"""What is released: wheel and sdist hold the same and are what an index takes, run in a clean environment, and are typed."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from conftest import write_dataset
from packaging.requirements import Requirement

import recbole_fedkd

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("build", reason="the extra 'dev' is not installed")


def told(command, **keys):
    """What a command prints; it must succeed."""
    keys.setdefault("env", {name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    ran = subprocess.run(command, check=False, capture_output=True, text=True, **keys)
    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The sdist, and the wheel that is built of it and of nothing else."""
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    told(["git", "clone", "-q", "--depth=1", f"file://{ROOT}", str(source)])
    changed = told(["git", "ls-files", "-m", "-o", "--exclude-standard"], cwd=ROOT).split()
    for name in changed:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    told([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)])
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def clean(released, tmp_path_factory):
    """An environment with the wheel, and the tested dependencies of this one; nothing of the checkout."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    own = Path(told([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    told([str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(released[1])])
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_wheel_and_sdist_are_what_an_index_takes(released):
    told([sys.executable, "-m", "twine", "check", "--strict", *map(str, released)])


def test_the_wheel_made_of_the_sdist_holds_every_file_of_the_package(released):
    inside = set(zipfile.ZipFile(released[1]).namelist())
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / "recbole_fedkd").rglob("*") if file.is_file()}
    expected |= {f"recbole_fedkd/{file.relative_to(ROOT)}" for file in (ROOT / "properties").rglob("*.yaml")}
    expected = {name for name in expected if "__pycache__" not in name}
    assert expected <= inside
    beside = {name for name in inside if not name.startswith("recbole_fedkd/") and ".dist-info/" not in name}
    assert beside == set()
    with tarfile.open(released[0]) as sdist:
        assert any(name.endswith("LICENSE") for name in sdist.getnames())


def brought_by_extras(wheel):
    """Names that are imported from what extras of a wheel bring and the package itself does not."""
    with zipfile.ZipFile(wheel) as inside:
        (metadata,) = [name for name in inside.namelist() if name.endswith(".dist-info/METADATA")]
        lines = inside.read(metadata).decode().splitlines()
    required = [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist: ")]
    extra = {each.name.lower() for each in required if each.marker}
    # RecBole and torch bring setuptools where they are installed.
    extra -= {each.name.lower() for each in required if not each.marker} | {"setuptools"}
    found = {name for name, owners in packages_distributions().items() if {each.lower() for each in owners} & extra}
    return found | extra


def test_the_installed_command_runs_away_from_the_checkout_and_without_any_extra(released, clean, tmp_path):
    write_dataset(tmp_path / "dataset")
    missing = brought_by_extras(released[1])
    assert {"cryptography", "opacus", "flwr", "pyarrow"} <= missing
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({missing}))\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(tmp_path / "without")
    command = str(clean.parent / "recbole-fedkd")
    where = {"cwd": tmp_path, "env": environment}
    assert told([command, "--version"], **where).strip() == f"recbole_fedkd {recbole_fedkd.__version__}"
    found = told([str(clean), "-c", "import recbole_fedkd; print(recbole_fedkd.__file__)"], **where)
    assert Path(found.strip()).is_relative_to(clean.parent.parent)
    said = told([command, "--model=Bias", "--dataset=tiny"], **where)
    assert "mae" in said and (tmp_path / "saved").is_dir()
    federated = [command, "--model=AttnFedKD", "--dataset=tiny", "--client_num=3", "--epochs=1", "--engine=processes"]
    assert "mae" in told(federated, **where)
    masked = subprocess.run(
        [*federated, "--secure_aggregation=True"], check=False, capture_output=True, text=True, **where
    )
    assert masked.returncode != 0 and "Traceback" not in masked.stderr
    assert "secure_aggregation needs the package cryptography" in masked.stderr


USER = """
from pathlib import Path

import recbole_fedkd
from recbole_fedkd import load, run_recbole_fedkd, write_report
from recbole_fedkd.extend import AveragingSettings, FederatedAveraging, register_strategy

result = run_recbole_fedkd("AttnFedKD", "ml-100k", config_dict={"epochs": 1})
model = load(result["run_folder"])
table = model.recommend(["196"], k=3)
page: Path = write_report(Path(result["run_folder"]))
model.recommend(["196"], k="three")
load()
recbole_fedkd.lod


@register_strategy
class Mine(FederatedAveraging):
    name = "mine"
    settings_type = AveragingSettings


reveal_type(model)
reveal_type(load)
"""


def test_a_stranger_gets_types(clean, tmp_path):
    """mypy, from outside, over the installed wheel: it knows what is right, and finds what is wrong."""
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\ndisallow_subclassing_any = False\n"
        # What is tried is this package; types of the large libraries take a minute to read.
        "[mypy-torch.*,scipy.*,sympy.*,pandas.*,matplotlib.*,optuna.*,recbole.*,numpy.typing]\n"
        "ignore_missing_imports = True\nfollow_imports = skip\n"
    )
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--python-executable",
        str(clean),
        "--cache-dir",
        str(tmp_path / "c"),
        "user.py",
    ]
    said = subprocess.run(
        command, check=False, cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
    ).stdout
    found = dict(re.findall(r"^user\.py:(\d+): (.+)$", said, re.M))
    lines = USER.splitlines()
    told_of = {lines[int(number) - 1].strip(): text for number, text in found.items()}
    assert told_of.pop("reveal_type(model)").endswith(
        'Revealed type is "recbole_fedkd.recommend.recommender.Recommender"'
    )
    assert "-> recbole_fedkd.recommend.recommender.Recommender" in told_of.pop("reveal_type(load)")
    assert told_of.keys() == {'model.recommend(["196"], k="three")', "load()"}, said


def test_version_changelog_and_citation_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == recbole_fedkd.__version__
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= citation.keys()
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## Unreleased$.*^## {re.escape(recbole_fedkd.__version__)}\b", changes, re.M | re.S)
