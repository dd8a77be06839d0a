.PHONY: check docs format
check:  ## format, lint, types, tests: what CI runs
	ruff format --check .
	ruff check .
	mypy
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
format:
	ruff format .
	ruff check --fix .
docs:  ## the documentation site, strictly; the tests build and look at it too
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict
