.PHONY: check format
check:  ## format, lint, types, tests: what CI runs
	ruff format --check .
	ruff check .
	mypy
	python -m pytest
format:
	ruff format .
	ruff check --fix .
