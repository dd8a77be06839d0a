# Torch's own way of what loops in machine code do otherwise, as where numba is missing: files that say so by their mark.
WITHOUT_LOOPS := $(shell grep -l '^pytestmark = pytest.mark.without_loops' tests/test_*.py)
.PHONY: check docs format
check:  ## format, lint, types, tests: what CI runs
	ruff format --check .
	ruff check .
	mypy
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	NUMBA_DISABLE_JIT=1 python -m pytest -n 2 $(WITHOUT_LOOPS)
format:
	ruff format .
	ruff check --fix .
docs:  ## the documentation site, strictly; the tests build and look at it too
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict
