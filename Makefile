# make demo, make test, make test-all: each sets up all it needs. Options:
#   PYTHON=/path/to/python   use that environment (it must have torch) instead of making .venv
#   TORCH='torch==2.13.0'    what pip installs as torch into .venv
# make sanitize: the C++ code under ASan and UBSan
TORCH ?= torch==2.13.0
ifdef PYTHON
PY := $(PYTHON)
else
PY := .venv/bin/python
endif
STAMP := build/installed-$(subst /,_,$(subst =,_,$(PY)-$(TORCH)))

.PHONY: test test-all demo install lint sanitize clean

test: $(STAMP) lint
	$(PY) -m pytest -n auto --dist worksteal -p no:benchmark

# with the tests that are marked full
test-all: $(STAMP) lint
	$(PY) -m pytest -n auto --dist worksteal -p no:benchmark -m ""

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

demo: $(STAMP)
	$(PY) -m dft_kernels.commands.main demo

install: $(STAMP)

# the C++ code under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy beside the usual build
sanitize: $(STAMP)
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r setup.py pyproject.toml README.md LICENSE csrc dft_kernels tests build/sanitize/
	rm -f build/sanitize/dft_kernels/*.so
	cd build/sanitize && DFT_KERNELS_SANITIZE=1 $(abspath $(PY)) setup.py -q build_ext --inplace
	cd build/sanitize && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		$(abspath $(PY)) -m pytest tests/backends/test_native.py tests/backends/test_contract.py -k "native and not other_processors"

.venv/bin/python:
	python3 -m venv .venv || { echo "make: python3 needs its venv module (Debian: apt-get install python3-venv)"; exit 1; }

$(STAMP): setup.py pyproject.toml $(wildcard csrc/*/*) | $(if $(PYTHON),,.venv/bin/python)
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install -q '$(TORCH)'
	$(PY) -m pip install -q setuptools wheel ninja
	$(PY) -m pip install -q --no-build-isolation -e '.[dev]'
	mkdir -p build && touch $@

clean:
	rm -rf build .venv *.egg-info dft_kernels/*.so dft_kernels/_build.json
