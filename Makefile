# vfu-dev: `make demo-stock`, `make demo` and `make test` are enough on a fresh machine; `make help` lists the rest.
#
# Python dependencies go into .venv, for a demo without those of tests and lint; everything native is fetched, built and cached by `vfu-dev build`
# (see native/README.md), which also installs the Debian packages it misses when it runs as root.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    := out

# Debian's own QEMUs, fetched as packages: an older one and a newer one than ours.
STOCK_QEMUS := qemu-bookworm-backports qemu-trixie-backports

# That of demo-stock; the newer one: `make demo-stock DEMO_QEMU=trixie-backports`.
DEMO_QEMU ?= bookworm-backports

# What the tests drive: the patched QEMU, the same with ASan (hostile servers), one without our patches, Debian's, the peer in C.
TEST_ARTIFACTS := libvfio-user libvfio-user-tests libvfio-user-reduced vfu-kernels bench-peer bench-client vfio-preload guest \
    fuzz-targets $(STOCK_QEMUS) qemu qemu-unpatched qemu-asan

# A file's tests stay together: many share one booted guest. 0 runs all of them in one process.
TEST_WORKERS ?= 2

TEST_PACKAGES := $(shell sed '/^\#/d' tests/packages.txt)

.PHONY: help demo demo-says demo-stock test test-optimized soak crash-matrix profile-loop profile-results fuzz \
        fuzz-repro fuzz-corpus test-packages packages-newest lint format clean distclean build venv venv-lab wheel docs \
        images test-images

help:
	@echo "make demo-stock live-migrate a Linux guest and its device with Debian's QEMU as it is; report in $(OUT)/demo-stock"
	@echo "make demo       the same with our QEMU, which has vfio-user-pci and is compiled first; report in $(OUT)/demo"
	@echo "make test       all tests, end to end included (PYTEST_ARGS=... to choose, TEST_WORKERS=0 for one process)"
	@echo "make soak       the tests that are too long for that: a thousand moves, fifty over all versions of QEMU, ..."
	@echo "make crash-matrix   kill or stop each process of a move at each moment of it; the table, and $(OUT)/crash-matrix.json"
	@echo "make profile-results   each shipped profile in three QEMUs, docs/profile-results.md anew; 8 minutes"
	@echo "make profile-loop   replay each shipped profile at full size with three QEMUs, and compare what is imported again"
	@echo "make test-optimized tests/unit and tests/wire with servers and commands under python -O"
	@echo "make fuzz       an hour of fuzzing (FUZZ_SECONDS=N, FUZZ_JOBS=N); docs/fuzzing.md"
	@echo "make lint       ruff and mypy"
	@echo "make build      libvfio-user, QEMU and the guest, built or found in the cache"
	@echo "make wheel      a wheel with libvfio-user, the preload library and the guest program inside, in dist"
	@echo "make images     container images vfu-dev and vfu-dev-lab, by podman or buildah (docs/images.md)"
	@echo "make test-images    build the image vfu-dev-lab; move in one container of it, and between two pods"
	@echo "make docs       the documentation as a site, in $(OUT)/site"
	@echo "make packages-newest   Debian's own QEMUs anew, in the versions that the mirror has today"
	@echo "make clean      what this checkout made; distclean: the virtual environment too"

venv: $(VENV)/.installed-test
venv-lab: $(VENV)/.installed-lab

# Debian splits ensurepip out of python3; install it when it is missing and we may.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "vfu-dev needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	    { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv; } || \
	    { echo "Python's venv module is missing: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

PIP_INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check

$(VENV)/.installed-lab: $(VENV)/.made pyproject.toml
	$(PIP_INSTALL) -e '.[lab]'
	@touch $@

$(VENV)/.installed-wheel $(VENV)/.installed-site: $(VENV)/.installed-%: $(VENV)/.made pyproject.toml
	$(PIP_INSTALL) -e '.[$*]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.made pyproject.toml
	$(PIP_INSTALL) -e '.[lab,test]'
	@touch $@ $(VENV)/.installed-lab $(VENV)/.installed-wheel $(VENV)/.installed-site

build: venv-lab
	$(BIN)/vfu-dev build libvfio-user vfu-kernels qemu guest

# 32 MiB/s and a switchover bandwidth of 4 MiB/s: with QEMU's defaults, 128 MiB/s and a measured one, the whole
# device would fit into the downtime limit, and there would be no pre-copy to look at. Status 3: the machine was
# too busy for the load, and says so; the migration itself is as it should be.
LAB_MIGRATE = $(BIN)/vfu-dev lab migrate --max-bandwidth 32M --avail-switchover-bandwidth 4M

demo: demo-says build
	$(LAB_MIGRATE) --out $(OUT)/demo || [ $$? = 3 ]

demo-says:
	@echo "make demo: the first time it builds QEMU, 8 to 14 minutes on two cores; later it takes about half a minute."
	@echo "make demo-stock shows the same with Debian's own QEMU, which is not compiled: 2 to 4 minutes the first time."

demo-stock: venv-lab
	$(BIN)/vfu-dev build libvfio-user vfu-kernels vfio-preload guest qemu-$(DEMO_QEMU)
	$(LAB_MIGRATE) --qemu $(DEMO_QEMU) --out $(OUT)/demo-stock || [ $$? = 3 ]

# A wheel that carries the native parts, for machines without a compiler.
wheel: $(VENV)/.installed-wheel
	$(BIN)/python release/make_wheel.py dist

# Strict: a link that leads nowhere is an error. Manual pages, too: out/share/man.
docs: $(VENV)/.installed-site
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --nitpicky --conf-dir docs/site . $(OUT)/site
	$(BIN)/python -m vfu_dev.cli.manual $(OUT)
	@echo "$(OUT)/site/index.html"

# In a container that may not make others: IMAGE_OPTIONS="--isolation chroot".
images: venv-lab
	$(BIN)/vfu-dev build libvfio-user vfu-kernels vfio-preload guest qemu qemu-bookworm-backports
	$(BIN)/python deploy/container/images.py $(IMAGE_OPTIONS)

# The moves of docs/images.md, in containers on this machine; root, buildah.
test-images: venv test-packages
	$(BIN)/vfu-dev build libvfio-user vfu-kernels vfio-preload guest qemu qemu-bookworm-backports
	$(BIN)/pytest -m images tests/deploy $(PYTEST_ARGS)

packages-newest: venv-lab
	VFU_DEV_PACKAGES= $(BIN)/vfu-dev build --again $(STOCK_QEMUS)

test: venv test-packages
	$(BIN)/vfu-dev build $(TEST_ARTIFACTS)
	$(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

# The long run: what `make test` leaves out. The samples of memory, descriptors and so on go to $(OUT)/soak.
soak: venv test-packages
	$(BIN)/vfu-dev build $(TEST_ARTIFACTS)
	mkdir -p $(OUT)/soak
	VFU_DEV_SOAK_FIGURES=$(abspath $(OUT)/soak) $(BIN)/pytest -m soak -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

# All cells of docs/crash-matrix.md, of which `make test` runs some.
crash-matrix: venv test-packages
	$(BIN)/vfu-dev build libvfio-user vfu-kernels qemu
	$(BIN)/python tests/crash_page.py run $(OUT)/crash-matrix.json -n $(TEST_WORKERS) -q $(PYTEST_ARGS)

# The tables of docs/profile-results.md, from migrations with the three QEMUs. PROFILE_RESULTS_ARGS="--set run.moves=1": fewer.
profile-results: venv-lab
	$(BIN)/vfu-dev build libvfio-user vfu-kernels vfio-preload guest qemu $(STOCK_QEMUS)
	$(BIN)/python docs/profile-results/collect.py run $(OUT)/profile-results $(PROFILE_RESULTS_ARGS)

# Status 3: all is the same, but this machine could not keep every time. PROFILE_LOOP_ARGS=... such as --profile mlx5-300mb.
profile-loop: venv
	$(BIN)/vfu-dev build libvfio-user vfu-kernels vfio-preload qemu $(STOCK_QEMUS)
	PYTHONPATH=tests/lab $(BIN)/python tests/profile_loop.py --json $(OUT)/profile-loop.json $(PROFILE_LOOP_ARGS)

# Servers and commands without their assertions; pytest keeps its own.
test-optimized: venv test-packages
	$(BIN)/vfu-dev build $(TEST_ARTIFACTS)
	VFU_DEV_TEST_OPTIMIZED=1 $(BIN)/pytest -n $(TEST_WORKERS) --dist loadfile tests/unit tests/wire $(PYTEST_ARGS)

# For all targets together; status 1 if something was found. FUZZ_ARGS=... for more, such as --json FILE.
FUZZ_SECONDS ?= 3600
FUZZ_JOBS ?= 1

fuzz: venv
	$(BIN)/vfu-dev build fuzz-targets
	$(BIN)/python tests/fuzz/fuzz.py run --seconds $(FUZZ_SECONDS) --jobs $(FUZZ_JOBS) $(FUZZ_ARGS)

# FILE=out/fuzz/findings/TARGET/crash-...: give that input to its target again.
fuzz-repro: venv
	$(BIN)/vfu-dev build fuzz-targets
	$(BIN)/python tests/fuzz/fuzz.py repro $(FILE)

# tests/fuzz/corpus from recordings of today, and what out/fuzz has beyond them.
fuzz-corpus: venv
	$(BIN)/vfu-dev build fuzz-targets libvfio-user
	$(BIN)/python tests/fuzz/fuzz.py corpus

# What tests need from Debian beyond what builds bring; without root, a test that misses one is skipped.
test-packages:
	@missing=""; for package in $(TEST_PACKAGES); do \
	    dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'install ok installed' || \
	        missing="$$missing $$package"; \
	done; \
	[ -z "$$missing" ] || \
	    { [ "$$(id -u)" = 0 ] && echo "installing$$missing" && apt-get update -qq && \
	      DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; } || \
	    echo "tests will be skipped for want of:$$missing" >&2

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(OUT) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
