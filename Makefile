# faasd: private functions on one server. `make` says what there is to make.

# Hosts of the demo and of the tests need root. Root's shell may be without sudo.
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# The first Python that is new enough, with the PATH that root's tools are in.
export PATH := $(PATH):/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
PYTHON := $(shell for p in python3 /usr/bin/python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v $$p; break; }; done)
# sudo forgets these; and a root that leaves __pycache__ in somebody's checkout would be in the way.
AS_ROOT = $(SUDO) env PATH="$(PATH)" TERM="$(TERM)" NO_COLOR="$(NO_COLOR)" PYTHONDONTWRITEBYTECODE=1
RUFF = $(or $(shell command -v ruff),.venv-lint/bin/ruff)

.PHONY: help deps demo install uninstall test bench lint clean python

help:
	@echo 'make deps       install what is missing: WireGuard, runc, nftables, CoreDNS ...'
	@echo 'make demo       show the whole story on this machine: a server, a laptop, a function, the VPN'
	@echo 'make install    make faasd services of systemd that start at boot; DESTDIR and PREFIX as usual'
	@echo 'make uninstall  take them away again, but for data and keys; PURGE=1 takes those too'
	@echo 'make test       run every test, or some: make test TESTS="test_registry test_faas.Connect"'
	@echo 'make bench      how fast it is beside tar, a bare server and nginx; JSON=FILE, ROWS="go-keepalive ..."'
	@echo 'make lint       check the code with ruff'
	@echo 'make clean      remove what the above left in this folder'

deps:
	@./deps.sh

python:
	@[ -n "$(PYTHON)" ] || { echo 'Python 3.11 or newer is needed (apt install python3)' >&2; exit 1; }

demo: python deps
	@$(AS_ROOT) $(PYTHON) -m tests.demo

install uninstall:
	@./install.sh $@

test: python
	@./deps.sh test
	@$(AS_ROOT) $(PYTHON) -m tests $(TESTS)

bench: python
	@./deps.sh test
	@$(AS_ROOT) $(PYTHON) -m tests.bench $(if $(JSON),--json '$(JSON)') $(ROWS)

lint: $(filter .venv-lint/%,$(RUFF))
	$(RUFF) check .

# A Python of Debian's can make a venv only with another package of Debian's.
.venv-lint/bin/ruff: | python
	$(PYTHON) -m venv .venv-lint || \
		{ $(SUDO) apt-get install -q -y --no-install-recommends python3-venv && $(PYTHON) -m venv .venv-lint; }
	.venv-lint/bin/pip install --quiet --disable-pip-version-check ruff==0.17.6

clean:
	rm -rf .venv-lint .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
