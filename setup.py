"""Packaging: ``properties/`` stays at the top level of the repository and ships inside the package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "recbole_fedkd" / "__init__.py").read_text()).group(1)
PROPERTIES = ["recbole_fedkd.properties"] + [
    f"recbole_fedkd.properties.{folder.name}" for folder in sorted((HERE / "properties").iterdir()) if folder.is_dir()
]

setup(
    name="recbole-fedkd",
    version=VERSION,
    description="Federated knowledge distillation for RecBole",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    # RecBole asks for a ray that ends at 3.11; docs/install.md says how it runs on 3.12 without.
    python_requires=">=3.11",
    packages=[*find_packages(include=["recbole_fedkd", "recbole_fedkd.*"]), *PROPERTIES],
    package_dir={package: package.replace("recbole_fedkd.", "", 1).replace(".", "/") for package in PROPERTIES},
    package_data={package: ["*.yaml", "*.txt"] for package in PROPERTIES}
    | {
        "recbole_fedkd": ["py.typed"],
        "recbole_fedkd.report": ["templates/*"],
        "recbole_fedkd.machines": ["flower_app/*"],
    },
    entry_points={"console_scripts": ["recbole-fedkd=recbole_fedkd.__main__:main"]},
    # RecBole is pinned: every minor release so far broke its extensions. pandas 3 breaks its data loading. The other
    # bounds say what the code needs and which next major version nobody has tried; constraints.txt is the tested set.
    install_requires=[
        "argcomplete>=3.5,<4",
        "recbole==1.2.1",
        "torch>=2.6,<3",
        "numpy>=1.26,<3",
        "pandas>=2.0,<3",
        "scipy>=1.11,<2",
        "filelock>=3.12,<5",
        "Jinja2>=3.1,<4",  # the pages of reports; torch brings it
        "matplotlib>=3.8,<4",
        "msgpack>=1.0,<2",
        # Compiles training and full rankings; where it is missing they take several passes of torch's.
        "numba>=0.60,<1",
        "optuna>=4,<6",
        "psutil>=5,<8",
        "PyYAML>=6.0,<7",
        "texttable>=1.6,<2",
        "tqdm>=4.60,<5",
    ],
    extras_require={
        # Looks at the pages of reports in a headless browser; the browser is the system's (Debian: chromium) or playwright's.
        "browser": ["playwright>=1.40,<2"],
        # Counts what sampling of clients is worth to differential privacy.
        "privacy": ["opacus>=1.5,<2"],
        # Keys, ciphers and key derivation of secure aggregation.
        "secagg": ["cryptography>=43,<60"],
        # The documentation site: pages with an offline search, signatures from docstrings, equations as MathML when it is
        # built (no page asks another host), and what runs the notebook.
        "docs": [
            "ipykernel>=6.29,<8",
            "latex2mathml>=3.77,<4",
            "mkdocs-material>=9.6,<10",
            "mkdocstrings[python]>=0.29,<2",
            "nbclient>=0.10,<1",
        ],
        # Parties and coordinator over Flower; its Fleet API is no public one, so the minor version is pinned.
        # Never flwr[simulation]: its ray cannot live beside RecBole's.
        "flower": ["flwr>=1.42,<1.43"],
        "dev": [
            # Wheel and sdist, and what an index would say of them.
            "build>=1.2,<2",
            "setuptools>=68",
            "twine>=6,<8",
            "cryptography>=43,<60",
            "flwr>=1.42,<1.43",
            "hypothesis>=6.100,<7",
            "mypy>=1.15,<3",
            "opacus>=1.5,<2",
            # The flame graph of docs/performance.md.
            "py-spy>=0.4,<1",
            "pyarrow>=14,<30",
            "pytest>=8,<10",
            # The tests on two processor cores at a time.
            "pytest-xdist>=3.7,<4",
            "ruff>=0.9,<1",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
