.PHONY: check test format docs

check:
	ruff check .
	ruff format --check .
	mypy

format:
	ruff check --fix .
	ruff format .

test:
	pytest -n auto --dist loadfile

docs:
	python -m pdoc -d markdown -o build/docs moe.layers moe.kernels moe.model moe.checkpoint moe.generation
