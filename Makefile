# Everything is installed into $(VENV), nothing outside it; only Python and make are needed beforehand.
# The syntax is that of GNU make 3.81, which macOS still ships.

PYTHON ?= python3
# Not taken from the environment: what VENV names there may be somebody's own, and would be replaced.
VENV = .venv
ARGS =

# The same pins stand in the block at the top of tracker.py. Each hash is that of the package's one wheel,
# which serves every Python and system.
define RUNTIME_PACKAGES
gunicorn==27.0.1 \
    --hash=sha256:378b26b9a38adcf4592f28828233c1716acc55e833ea06bf48719782efaa0d10
endef
export RUNTIME_PACKAGES

# Prints the key of the virtual environment (it is made anew when Python or the folder changes), then the
# interpreter to make it with: inside an active venv the one below it, as a venv can't replace itself.
# Must run on any old Python, so that it can say what is wrong.
define CHECK_PYTHON
import os, sys
version = ".".join(map(str, sys.version_info[:3]))
if sys.version_info < (3, 10):
    sys.exit("Python 3.10 or later is needed, but this is " + version + ": try make PYTHON=python3.12")
try:
    import ensurepip, venv
except ImportError:
    sys.exit("This Python has no venv module: on Debian or Ubuntu, apt install python3-venv")
print(" ".join([version, sys.base_prefix, os.getcwd()]))
print(sys.executable if sys.prefix == sys.base_prefix else os.path.realpath(sys.executable))
endef
export CHECK_PYTHON

# The user's settings for indexes, proxies and certificates count; those that add, cap or move packages do
# not: an environment variable overrides pip's configuration files, and /dev/null is an empty list.
# -I: a PYTHONPATH must not make pip believe that a package is there already.
# -q twice: a setting that concerns other packages would else print a warning for each of ours.
PIP_INSTALL = unset PIP_EDITABLE PIP_PREFIX PIP_ROOT PIP_TARGET; \
	PIP_CONSTRAINT=/dev/null PIP_REQUIREMENT=/dev/null PIP_USER=0 \
	$(VENV)/bin/python -I -m pip --disable-pip-version-check -q -q \
	install --require-hashes --only-binary :all:

# $(call install,what it is called,its requirements file,options of pip): installs unless this very list was installed.
# The copy is made last, so that a broken installation is tried again; each list has its own, by its whole path.
define install
@if ! cmp -s $(2) $(VENV)/installed-$(subst /,-,$(2)); then \
	echo "Installing $(1) into $(VENV)"; \
	{ $(PIP_INSTALL) $(3) -r $(2); } && cp $(2) $(VENV)/installed-$(subst /,-,$(2)); \
fi
endef

.PHONY: help run demo dist test test-faults screenshots bench lint format clean venv runtime-packages test-packages apart-packages bench-packages node-packages lint-packages

help: ## print this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

# As a module, so that Python keeps it compiled: a script is compiled anew at each start.
run: runtime-packages ## start the tracker on this machine
	@exec $(VENV)/bin/python -m tracker serve --local

# A database of its own, made anew each time: the demo must never mix with real numbers.
demo: runtime-packages ## fill data/demo with half a year of made-up mail, print its dashboards, serve it
	@rm -rf data/demo
	@DATABASE_URL=sqlite:data/demo/tracking.db $(VENV)/bin/python tests/demo.py
	@exec env DATABASE_URL=sqlite:data/demo/tracking.db $(VENV)/bin/python -m tracker serve --local

# Without hash randomisation, which would order sets differently each time: the same sources give the same bytes.
dist: runtime-packages ## build dist/email-tracker.pyz, the whole program in one file
	@PYTHONHASHSEED=0 PYTHONOPTIMIZE= $(VENV)/bin/python .make/dist.py

screenshots: test-packages ## make the two pictures of README anew
	@.make/debian chromium
	@$(VENV)/bin/python tests/screenshots.py

# In two processes, each file in one of them: half the time on two cores. Every server takes a free port of its own.
test: test-packages apart-packages ## run the tests; some of them: make test ARGS="-k pixel"
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

# What is timed needs both cores, and goes first; of the others, which kill and wait, two run at a time. They print figures.
test-faults: test-packages ## kill, crowd, cut off and restore real servers for some minutes
	@.make/debian nginx postgresql
	@$(VENV)/bin/python -m pytest -s -m timed tests/faults.py $(ARGS) || [ $$? -eq 5 ]  # none was asked for
	@$(VENV)/bin/python -m pytest -n 2 --dist worksteal -rP -m "not timed" tests/faults*.py $(ARGS) || [ $$? -eq 5 ]

bench: bench-packages node-packages ## compare with others, time pages with a year of mail; less: make bench ARGS=--quick
	@.make/debian nginx wrk
	@$(VENV)/bin/python tests/bench/bench.py $(ARGS)
	@$(VENV)/bin/python tests/bench/instrument.py
	@$(VENV)/bin/python tests/bench/pages.py $(filter --quick,$(ARGS))
	@$(VENV)/bin/python tests/bench/passes.py
	@$(VENV)/bin/python tests/bench/drain.py $(if $(filter --quick,$(ARGS)),--scale 0.1 --pairs 1)

lint: lint-packages ## check style and types
	@$(VENV)/bin/python -m ruff check .
	@$(VENV)/bin/python -m ruff format --check .
	@$(VENV)/bin/python -m mypy --strict tracker.py tests .make/dist.py

format: lint-packages ## lay out the code, mend what can be mended
	@$(VENV)/bin/python -m ruff check --fix-only .
	@$(VENV)/bin/python -m ruff format .

clean: ## remove what make and the tools made; data/ stays
	@rm -rf .venv .venv-* .mypy_cache .pytest_cache .ruff_cache dist
	@find . -path ./data -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# Only a folder that is a venv (or nothing yet) is ever replaced: VENV may have been mistyped.
venv:
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "There is no $(PYTHON): install Python 3.10 or later, or try make PYTHON=python3.12" >&2; exit 1; }
	@found=$$("$(PYTHON)" -c "$$CHECK_PYTHON") || exit 1; \
	key=$$(echo "$$found" | sed -n 1p); python=$$(echo "$$found" | sed -n 2p); \
	if [ -x $(VENV)/bin/python ] && [ "$$key" = "$$(cat $(VENV)/made-with 2>/dev/null)" ]; then exit 0; fi; \
	if [ -e $(VENV) ] && [ ! -e $(VENV)/pyvenv.cfg ] && ! rmdir $(VENV) 2>/dev/null; then \
		echo "$(VENV) is in the way: it is not a virtual environment" >&2; exit 1; fi; \
	echo "Creating $(VENV) with Python $${key%% *}"; \
	rm -rf $(VENV) && "$$python" -m venv $(VENV) && echo "$$key" >$(VENV)/made-with

runtime-packages: venv
	@printf '%s\n' "$$RUNTIME_PACKAGES" >$(VENV)/runtime.txt
	$(call install,the runtime packages,$(VENV)/runtime.txt)

test-packages: runtime-packages
	$(call install,the test packages,tests/requirements.txt)

# schemathesis brings plugins of pytest, so these have a folder of their own. Without them their tests are skipped.
apart-packages: venv
	@cmp -s tests/requirements-apart.txt $(VENV)/installed-tests-requirements-apart.txt || rm -rf $(VENV)/apart
	-$(call install,packages that tests start,tests/requirements-apart.txt,--no-compile --target $(VENV)/apart)

bench-packages: test-packages
	$(call install,the packages of the benchmark,tests/bench/requirements.txt)

# What npm offers goes into $(VENV) too. better-sqlite3 is compiled, from the headers of the node that is there.
# Without it the benchmark says whom it leaves out.
NODE = $(VENV)/node
node-packages: venv
	@command -v npm >/dev/null || .make/debian nodejs npm libnode-dev g++ make python3
	@if ! cmp -s tests/bench/package-lock.json $(NODE)/installed; then \
		echo "Installing what the benchmark needs of npm into $(NODE)"; \
		mkdir -p $(NODE) && cp tests/bench/package.json tests/bench/package-lock.json $(NODE) && \
		npm ci --prefix $(NODE) --no-audit --no-fund --loglevel error \
			$(if $(wildcard /usr/include/node),--nodedir=/usr) && \
		cp tests/bench/package-lock.json $(NODE)/installed || echo "npm could not install them" >&2; fi

# mypy reads the tests too, so it needs what they import.
lint-packages: test-packages
	$(call install,the developer tools,tests/requirements-lint.txt)
