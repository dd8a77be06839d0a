.PHONY: check format
check:  ## format, lint, types, tests: what CI runs
	ruff format --check .
	ruff check .
	mypy
	python -m pytest -n 2 --dist loadfile
format:
	ruff format .
	ruff check --fix .
