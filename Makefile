# make demo   and   make test   install all that they need. `make help` lists the rest.

VENV := .venv
OUT := demo_out
JOBS := 2
PAIRS := 250
SHARD := 1/1

# Names may hold spaces and quotes: recipes quote them for the shell, the stamp's name is escaped for make.
quote = '$(subst ','\'',$(1))'
space := $(subst ,, )
STAMP := $(subst $(space),\ ,$(subst $$,$$$$,$(VENV)))/.installed
PY = $(call quote,$(VENV)/bin/python)

$(foreach name,VENV OUT,$(if $(strip $($(name))),,$(error $(name) is empty; name a folder, or leave $(name)= out)))

ifneq ($(filter test-main,$(MAKECMDGOALS)),)
$(if $(strip $(MEGATRON)),,$(error MEGATRON is empty; name a checkout: make test-main MEGATRON=/path/to/Megatron-LM))
endif

.PHONY: help venv demo test test-all test-main test-pairs quality-smoke check lint format types docs clean

help:
	@echo 'make demo    install, then train a small hybrid model on real text, plot the loss, continue a prompt'
	@echo '             (about 5 minutes on 2 CPU cores; on a GPU where there is one)'
	@echo 'make test    install, then lint, types and tests (those marked gpu are skipped without a GPU); of tests with many'
	@echo '             slow cases some are drawn by a seed'
	@echo 'make test-all    all cases of them, too'
	@echo 'make test-main MEGATRON=/path/to/Megatron-LM'
	@echo '             all tests with Megatron of that checkout instead of the installed megatron-core'
	@echo 'make test-pairs  options together: PAIRS=250 training runs, SHARD=1/2 of them, about an hour on 2 idle cores'
	@echo 'make quality-smoke  the pipeline of docs/quality.md at toy size on the CPU, under 5 minutes on 2 idle cores'
	@echo 'make check   lint, types and the quick tests, in at most 90 seconds: before every commit'
	@echo 'make docs    build the documentation into docs/_build/html; a warning is an error'
	@echo 'make venv    only install, into .venv: 5 GB, because torch for Linux brings its CUDA libraries'
	@echo 'make lint    only ruff: check and format'
	@echo 'make format  let ruff format the code, and fix what it can'
	@echo 'make types   only mypy, over the public modules'
	@echo 'make clean   remove what make made: the environment, the results of the demo, the docs, caches'
	@echo 'Variables:   PYTHON=/path/to/python3.12   VENV=.venv   OUT=demo_out   JOBS=2   PYTEST="-k name -x"'

venv: $(STAMP)

# uv takes a third of the time of pip; pip is there for what only pip.conf knows, such as a mirror.
$(STAMP): setup.py tests/constraints.txt
	@set -e; start=$$(date +%s); venv=$(call quote,$(VENV)); \
	if ! "$$venv/bin/python" -m pip --version >/dev/null 2>&1; then \
		if [ -n "$$(ls -A -- "$$venv" 2>/dev/null)" ] && [ ! -e "$$venv/.lightning_venv" ]; then \
			echo "VENV=$$venv holds files that make did not write, and no environment with pip:" \
				"name another folder, or an empty one" >&2; exit 1; \
		fi; \
		python=$$(sh examples/find_python.sh); \
		echo "==> creating $$venv with $$python"; \
		mkdir -p -- "$$venv"; \
		trap 'touch "$$venv/.lightning_venv"' EXIT; trap 'exit 130' INT TERM; \
		"$$python" -m venv --clear "$$venv"; \
		touch "$$venv/.lightning_venv"; \
	fi; \
	echo "==> installing torch, megatron-core and this package: 5 GB, about a minute once downloaded"; \
	what="--constraint tests/constraints.txt --editable .[test,docs]"; \
	"$$venv/bin/python" -m pip install -qq --disable-pip-version-check uv || true; \
	if ! "$$venv/bin/uv" pip install --quiet --compile-bytecode --python "$$venv/bin/python" $$what; then \
		echo "==> uv could not do it; once more with pip"; \
		"$$venv/bin/python" -m pip install -qq --disable-pip-version-check $$what; \
	fi; \
	touch "$$venv/.installed"; \
	echo "==> installed in $$(( $$(date +%s) - start )) s"

demo: $(STAMP)
	@$(PY) examples/demo.py --out=$(call quote,$(OUT))

lint: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(STAMP)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

types: $(STAMP)
	@$(PY) -m mypy

test: DRAWN := --drawn=tests/drawn.txt
test test-all: lint types
	@start=$$(date +%s); $(PY) -m pytest tests -n $(JOBS) --dist worksteal $(DRAWN) $(PYTEST); status=$$?; \
	echo "==> tests took $$(( $$(date +%s) - start )) s"; exit $$status

test-main: $(STAMP)
	@start=$$(date +%s); $(PY) -m tests.checkout $(call quote,$(MEGATRON)) tests -n $(JOBS) --dist worksteal $(PYTEST); \
	status=$$?; echo "==> tests took $$(( $$(date +%s) - start )) s"; exit $$status

test-pairs: $(STAMP)
	@LIGHTNING_TEST_PAIRS=$(PAIRS) LIGHTNING_TEST_SHARD=$(SHARD) LIGHTNING_TEST_RANKS=4 $(PY) -m pytest -q -n $(JOBS) --dist worksteal \
		tests/test_pairs.py $(PYTEST)

quality-smoke: $(STAMP)
	@CUDA_VISIBLE_DEVICES= $(PY) -m examples.quality.smoke

check: lint types
	@start=$$(date +%s); $(PY) -m pytest -q -n $(JOBS) --dist worksteal @tests/quick.txt $(PYTEST); status=$$?; \
	echo "==> quick tests took $$(( $$(date +%s) - start )) s"; exit $$status

docs: $(STAMP)
	@$(PY) -m sphinx --fail-on-warning --keep-going --nitpicky --fresh-env --quiet docs docs/_build/html
	@echo 'docs/_build/html/index.html'

# Removes a folder that a user may have named only if it carries the mark of what made it, and not around the checkout.
# Of a link it removes what make wrote, which is the folder, and not the link.
remove_marked = @folder=$(call quote,$(1)); \
	if [ ! -e "$$folder" ]; then :; \
	elif [ ! -e "$$folder/$(2)" ]; then \
		echo "left $$folder: it holds no $(2), which $(3) writes; remove it yourself if you do not need it"; \
	else real=$$(CDPATH= cd -P -- "$$folder" && pwd -P) && case "$$(pwd -P)/" in \
		"$${real%/}/"*) echo "left $$folder: it holds this checkout; remove yourself what you do not need" ;; \
		*) rm -rf -- "$$real" ;; esac; fi

clean:
	$(call remove_marked,$(VENV),.lightning_venv,make venv)
	$(call remove_marked,$(OUT),.lightning_demo,make demo)
	rm -rf docs/_build .pytest_cache .ruff_cache .mypy_cache lightning_megatron.egg-info
	@for folder in docs examples lightning_megatron patches tests; do \
		[ ! -d $$folder ] || find $$folder -name __pycache__ -type d -prune -exec rm -rf {} +; \
	done
