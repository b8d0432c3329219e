# make demo   and   make test   install all that they need. `make help` lists the rest.

VENV := .venv
OUT := demo_out
STAMP := $(VENV)/.installed

.PHONY: help venv demo test lint clean

help:
	@echo 'make demo    install, then train a small hybrid model on real text, plot the loss, continue a prompt'
	@echo '             (about 5 minutes on 2 CPU cores; on a GPU where there is one; results in $(OUT)/)'
	@echo 'make test    install, then lint and run the tests (those marked gpu are skipped without a GPU)'
	@echo 'make venv    only install, into $(VENV)/: 5 GB, because torch for Linux brings its CUDA libraries'
	@echo 'make lint    only ruff'
	@echo 'make clean   remove what make made: $(VENV)/, $(OUT)/, caches'
	@echo 'Variables:   PYTHON=/path/to/python3.12   OUT=folder of the demo   PYTEST="-k name -x"'

venv: $(STAMP)

# uv takes a third of the time of pip; pip is there for what only pip.conf knows, such as a mirror.
$(STAMP): setup.py tests/constraints.txt
	@set -e; start=$$(date +%s); \
	if ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
		python=$$(sh examples/find_python.sh); \
		echo "==> creating $(VENV) with $$python"; \
		"$$python" -m venv --clear $(VENV); \
	fi; \
	echo "==> installing torch, megatron-core and this package: 5 GB, about a minute once downloaded"; \
	what="--constraint tests/constraints.txt --editable .[test]"; \
	$(VENV)/bin/python -m pip install -qq --disable-pip-version-check uv || true; \
	if ! $(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(VENV)/bin/python $$what; then \
		echo "==> uv could not do it; once more with pip"; \
		$(VENV)/bin/python -m pip install -qq --disable-pip-version-check $$what; \
	fi; \
	touch $@; \
	echo "==> installed in $$(( $$(date +%s) - start )) s"

demo: $(STAMP)
	@$(VENV)/bin/python examples/demo.py --out $(OUT)

lint: $(STAMP)
	@$(VENV)/bin/ruff check .

test: lint
	@start=$$(date +%s); $(VENV)/bin/python -m pytest tests $(PYTEST); status=$$?; \
	echo "==> tests took $$(( $$(date +%s) - start )) s"; exit $$status

clean:
	rm -rf $(VENV) $(OUT) build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -maxdepth 1 -name '*.egg-info' -exec rm -rf {} +
