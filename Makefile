# `make demo` and `make test` do all the set-up on a fresh machine with Python 3.11+.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-other-cpu lint clean

demo: .venv/installed
	$(BIN)/sparring demo --out demo

test: .venv/installed-dev
	$(BIN)/pytest -n 2 -m "not slow"

test-slow: .venv/installed-dev
	$(BIN)/pytest -m slow
	$(BIN)/pytest -n 2 -m "hypothesis and not slow" --hypothesis-profile=random

# what rounding could change, with the kernels of a CPU without AVX
test-other-cpu: .venv/installed-dev
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/pytest -n 2 -m "not slow" \
		tests/test_alignment.py tests/test_docstrings.py tests/core/test_noise.py tests/app/test_resume.py tests/training/test_loop.py \
		tests/evaluation/test_one_batch.py tests/evaluation/test_all_batches.py tests/evaluation/test_measure.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

# torchattacks declares pins that would replace torch; only its attacks are wanted, as an independent implementation
.venv/installed-dev: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --no-deps torchattacks==3.5.1
	touch $@

clean:
	rm -rf .venv demo
