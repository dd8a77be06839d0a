# Torch's own way of what loops in machine code do otherwise, as where numba is missing; about half a minute.
WITHOUT_LOOPS := $(addprefix tests/test_,presets.py by_hand.py catalogue.py convolving.py lookup.py moving.py moments.py)
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
