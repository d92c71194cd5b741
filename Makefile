.PHONY: quality format test

quality:
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .

test:
	python -m pytest
