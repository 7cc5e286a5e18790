# faasd: private functions on one server. `make` says what there is to make.

# Hosts of the demo and of the tests need root. Root's shell may be without sudo.
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# The first Python that is new enough, with the PATH that root's tools are in.
export PATH := $(PATH):/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
PYTHON := $(shell for p in python3 /usr/bin/python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
# sudo forgets these; and a root that leaves __pycache__ in somebody's checkout would be in the way.
AS_ROOT = $(SUDO) env PATH="$(PATH)" TERM="$(TERM)" NO_COLOR="$(NO_COLOR)" PYTHONDONTWRITEBYTECODE=1
RUFF = $(shell command -v ruff || ls .venv-lint/bin/ruff 2>/dev/null)
SCRIPTS = deps.sh install.sh .ci/run
# Public functions have annotations. A function without any fails by the first run of ruff; one that has some and lacks
# that of a parameter by the second, which ruff cannot tell in one run.
RETURNS = ANN201,ANN205,ANN206

.PHONY: help deps demo install uninstall check test fuzz bench lint lint-tools lint-present clean python

help:
	@echo 'make deps       install what is missing: WireGuard, runc, nftables, CoreDNS ...'
	@echo 'make demo       show the whole story on this machine: a server, a laptop, a function, the VPN'
	@echo 'make install    make faasd services of systemd that start at boot; DESTDIR and PREFIX as usual'
	@echo 'make uninstall  take them away again, but for data and keys; PURGE=1 takes those too'
	@echo 'make check      in half a minute: lint, and the tests that need neither root nor anything but Python'
	@echo 'make test       run every test, or some: make test TESTS="test_registry test_faas.Connect"'
	@echo 'make fuzz       throw wrong input at it for SECONDS=60; SEED=N repeats a run'
	@echo 'make bench      how fast it is beside tar, a bare server and nginx; JSON=FILE, ROWS="go-keepalive ..."'
	@echo 'make lint       check the code with ruff and the scripts with shellcheck'
	@echo 'make clean      remove what the above left in this folder'

deps:
	@./deps.sh

python:
	@[ -n "$(PYTHON)" ] || { echo 'Python 3.11 or newer is needed (apt install python3)' >&2; exit 1; }

demo: python deps
	@$(AS_ROOT) $(PYTHON) -m tests.demo

install uninstall:
	@./install.sh $@

# STRICT=1 here and at test, as in .ci/run: lint is installed, and a reason to skip a test is in tests/skips.txt.
check: python
	@$(MAKE) --no-print-directory $(if $(STRICT),lint,lint-present)
	@$(PYTHON) -B -m tests --check $(if $(STRICT),--strict)

test: python
	@./deps.sh test
	@$(AS_ROOT) $(PYTHON) -m tests $(if $(STRICT),--strict) $(TESTS)

fuzz: python
	@./deps.sh test
	@$(AS_ROOT) $(PYTHON) -m tests.fuzz $(or $(SECONDS),60) $(SEED)

bench: python
	@./deps.sh test
	@$(AS_ROOT) $(PYTHON) -m tests.bench $(if $(JSON),--json '$(JSON)') $(ROWS)

lint: lint-tools
	@$(MAKE) --no-print-directory lint-present

lint-present:
	@if [ -z "$(RUFF)" ]; then echo 'ruff is not installed: skipped (make lint installs it)'; else set -ex; \
		$(RUFF) check --extend-select $(RETURNS) .; \
		$(RUFF) check --select ANN001 --config lint.flake8-annotations.ignore-fully-untyped=true .; \
	fi
	@if ! command -v shellcheck >/dev/null; then echo 'shellcheck is not installed: skipped (make lint installs it)'; \
		else set -x; shellcheck $(SCRIPTS); fi

lint-tools: $(if $(RUFF),,.venv-lint/bin/ruff)
	@./deps.sh lint

.venv-lint/bin/ruff: | python
	@./deps.sh lint
	$(PYTHON) -m venv --clear .venv-lint
	.venv-lint/bin/pip install --quiet --disable-pip-version-check ruff==0.17.6

clean:
	rm -rf .venv-lint .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
