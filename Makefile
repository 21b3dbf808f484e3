# A fresh clone needs Python 3.11+, a C++17 compiler, make and a package registry.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
CMAKE := $(or $(shell command -v cmake 2>/dev/null),$(VENV)/bin/cmake)
NATIVE := $(wildcard csrc/* csrc/*/* cmake/*) CMakeLists.txt
INTERPRETED := $(addprefix tests/,test_triton.py test_capture.py test_step.py test_rng.py test_accept.py)

.PHONY: demo test lint bench bench-compare report docs models typecheck sanitize clean

# Rebuilt whenever the native sources or the requirements change; Python files need no reinstall.
$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[test,images,generate,dev]'
	touch $@

demo: $(STAMP)
	$(VENV)/bin/ebmfast demo --out demo.png

# Large, and only tests need it. Elsewhere the marker makes this nothing.
$(VENV)/.triton: constraints.txt $(STAMP)
	$(VENV)/bin/pip install --quiet -c constraints.txt "triton; platform_system == 'Linux' and platform_machine == 'x86_64'"
	touch $@

# Large, and only tests of data sets need them: readers and an engine of others.
$(VENV)/.datasets: constraints.txt $(STAMP)
	$(VENV)/bin/pip install --quiet -c constraints.txt datasets webdataset ray
	touch $@

# The second run interprets the Triton kernels; the first compiles them.
test: $(STAMP) $(VENV)/.triton $(VENV)/.datasets
	$(VENV)/bin/python -m pytest -q
	if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	TRITON_INTERPRET=1 EBMFAST_REQUIRE=$$EBMFAST_REQUIRE,triton $(VENV)/bin/python -m pytest -q $(INTERPRETED); fi

lint: $(STAMP)
	$(VENV)/bin/ruff check ebmfast kernels tests bench docs
	$(VENV)/bin/mypy --strict tests/typing

# What users see is typed, strictly.
typecheck: $(STAMP)
	$(VENV)/bin/mypy --strict tests/typing

# API pages and pictures, from the code.
docs: $(STAMP)
	$(VENV)/bin/python docs/api.py
	$(VENV)/bin/python docs/gallery.py
	$(VENV)/bin/pip install --quiet -c constraints.txt matplotlib
	$(VENV)/bin/python docs/pictures.py

# All measurements, about 15 minutes on two idle cores; make bench ONLY="chain quality" for some.
bench: $(STAMP)
	-$(VENV)/bin/pip install --quiet -c constraints.txt jax blackjax torchebm
	$(VENV)/bin/python -m bench $(if $(ONLY),--only $(ONLY))

# Tables and plots of what was measured, into docs/performance.md.
report: $(STAMP)
	$(VENV)/bin/pip install --quiet -c constraints.txt matplotlib
	$(VENV)/bin/python -m bench.report

# bench/suite here and at another commit, in turns: make bench-compare BASE=main
BASE ?= main
bench-compare: $(STAMP)
	$(VENV)/bin/pip install --quiet -c constraints.txt pytest-benchmark
	$(VENV)/bin/python -m bench.compare $(BASE)

# Every model of the experiments, one after the other, and what reads their samples; hours on two cores. RESOLUTION=64 for a GPU.
RESOLUTION ?= 32
MODELS := position shape coarse_color size objects joint stage_position stage_shape stage_color
models: $(STAMP)
	$(VENV)/bin/pip install --quiet -c constraints.txt mitsuba
	$(VENV)/bin/ebmfast scenes all --resolution $(RESOLUTION)
	for model in $(MODELS); do $(VENV)/bin/ebmfast train $$model --resolution $(RESOLUTION) --resume || exit 1; done

# The C++ core under sanitizers: needs a C++ compiler and cmake, but no Python where cmake is installed.
sanitize: $(CMAKE)
	@sh tests/native/sanitize.sh $(CMAKE) asan address,undefined
	@sh tests/native/sanitize.sh $(CMAKE) tsan thread

$(VENV)/bin/cmake:
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet cmake

clean:
	rm -rf build dist $(VENV)/.installed
