"""What is public: a list that only grows on purpose, documented to the last argument."""

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys

import pytest

import recbole_fedkd
from recbole_fedkd import extend

PUBLIC = {
    "recbole_fedkd": [
        "InputError",
        "Recommender",
        "TrainingError",
        "__version__",
        "load",
        "load_data_and_model",
        "run_recbole_fedkd",
        "write_report",
    ],
    "recbole_fedkd.extend": [
        "SERVER",
        "Aggregation",
        "ArraySpec",
        "AttentiveFederatedDistillation",
        "AveragingSettings",
        "Codec",
        "ExchangeSettings",
        "FederatedAveraging",
        "Knowledge",
        "LabelKnowledge",
        "LabelSettings",
        "LocalResult",
        "Message",
        "Schema",
        "Stage",
        "Step",
        "Strategy",
        "UserBase",
        "WeightedAggregation",
        "register_aggregation",
        "register_codec",
        "register_knowledge",
        "register_metric",
        "register_partition",
        "register_stage",
        "register_strategy",
        "setting",
    ],
}
ENTRIES = [getattr(module, name) for module in (recbole_fedkd, extend) for name in module.__all__]
CALLED = [
    *(entry for entry in ENTRIES if inspect.isroutine(entry)),
    *(each for name, each in vars(recbole_fedkd.Recommender).items() if inspect.isfunction(each) and name[0] != "_"),
]


@pytest.mark.parametrize("module", PUBLIC)
def test_what_is_public_is_this_list(module):
    assert importlib.import_module(module).__all__ == PUBLIC[module]


@pytest.mark.parametrize("called", CALLED, ids=lambda called: called.__qualname__)
def test_every_argument_and_result_of_a_public_function_is_documented(called):
    told, signature = inspect.getdoc(called), inspect.signature(called)
    for name, argument in signature.parameters.items():
        if name != "self":
            assert f"    {name}: " in told or f", {name}: " in told, f"{called.__qualname__} says nothing of {name}"
            assert argument.annotation is not inspect.Parameter.empty
    assert signature.return_annotation is not inspect.Signature.empty


def said_of(method, classes):
    """What the documentation says of a method: its own, that of the methods that it overrides, and of their classes."""
    overridden = (vars(each).get(method) for each in classes)
    return "\n".join(filter(None, (inspect.getdoc(each) for each in (*overridden, *classes) if each is not None)))


@pytest.mark.parametrize("public", [each for each in ENTRIES if inspect.isclass(each)], ids=lambda each: each.__name__)
def test_every_argument_of_what_authors_override_is_named(public):
    classes = [each for each in public.__mro__ if each.__module__.startswith("recbole_fedkd")]
    for method in {name for each in classes for name in vars(each) if name[0] != "_" or name == "__init__"}:
        entry = inspect.getattr_static(public, method)
        entry = getattr(entry, "__func__", entry)
        if not inspect.isfunction(entry) or entry.__module__.startswith("dataclasses"):
            continue
        if entry.__name__ == "__init__" and dataclasses.is_dataclass(public):
            continue  # its fields are its attributes; keys have a sentence each
        told = said_of(method, classes)
        for argument in list(inspect.signature(entry).parameters)[1:]:
            assert re.search(rf"\b{argument}s?\b", told), f"{public.__name__}.{method} says nothing of {argument}"


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_class_says_what_it_is(module):
    for name in PUBLIC[module]:
        entry = getattr(importlib.import_module(module), name)
        if not isinstance(entry, str | int):
            assert len(inspect.getdoc(entry) or "") > 20, name


def test_what_is_public_is_seen_by_tools_that_do_not_run_it():
    """An editor and mypy read the file: every name in ``__all__`` is imported or defined there."""
    tree = ast.parse(inspect.getsource(recbole_fedkd))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    names |= {target.id for node in ast.walk(tree) if isinstance(node, ast.Assign) for target in node.targets}
    assert set(recbole_fedkd.__all__) <= names


def test_importing_the_package_loads_neither_torch_nor_recbole():
    code = "import sys, recbole_fedkd; print(sorted({'torch', 'recbole', 'pandas'} & sys.modules.keys()))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
