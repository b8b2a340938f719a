.PHONY: help run demo test compat lint bench fuzz soak interop clean

PYTHON ?= python3
VENV = .venv
# pip for Python 3.6 does not pick the last versions that run there.
PYTEST_36 = pytest==7.0.1 pluggy==1.0.0 iniconfig==1.1.1 attrs==22.2.0 packaging==21.3 \
            pyparsing==3.0.9 importlib-metadata==4.8.3 tomli==1.2.3 py==1.11.0 zipp==3.6.0 \
            typing-extensions==4.1.1
PICK = import sys; print("$(PYTEST_36)" if sys.version_info < (3, 7) else "pytest")
install_pytest = $(1) -m pip install --quiet --disable-pip-version-check $$($(1) -c '$(PICK)')

help:
	@echo 'make run      start wsgate with ./wsgate.ini (ARGS="-c FILE")'
	@echo 'make demo     start wsgate with an echo backend and a page for the browser'
	@echo 'make test     run the tests, about a minute (ARGS="-k WORDS -x")'
	@echo 'make compat   run the tests under every Python from 3.6 to 3.15 found here'
	@echo 'make lint     compile all scripts, check wsgate.ini'
	@echo 'make fuzz     send mutated bytes for five minutes'
	@echo 'make soak     run all kinds of traffic for ten minutes'
	@echo 'make bench    measure beside nginx and haproxy, five minutes (ARGS=--quick)'
	@echo 'make interop  test with real clients, servers and a browser'
	@echo 'make clean    remove virtual environments and caches'

run:
	$(PYTHON) wsgate.py $(ARGS)

demo:
	$(PYTHON) wsgate.py --demo

# pytest is installed into a virtual environment; wsgate itself needs nothing.
$(VENV)/ready:
	$(PYTHON) -m venv $(VENV)
	$(call install_pytest,$(VENV)/bin/python)
	touch $@

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -q $(ARGS) test_wsgate.py

# Every python3.x in PATH and in ~/.pyenv/versions, each version once.
compat:
	@set -e; done=""; \
	for python in $$(ls $(HOME)/.pyenv/versions/3.*/bin/python 2>/dev/null) \
	              $$(for minor in 6 7 8 9 10 11 12 13 14 15; do \
	                     command -v python3.$$minor || true; done); do \
	    version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' \
	               2>/dev/null) || continue; \
	    case " $$done " in *" $$version "*) continue;; esac; done="$$done $$version"; \
	    echo "== Python $$version"; \
	    test -e $(VENV)-$$version/ready || { $$python -m venv $(VENV)-$$version; \
	        $(call install_pytest,$(VENV)-$$version/bin/python); \
	        touch $(VENV)-$$version/ready; }; \
	    suite="$(VENV)-$$version/bin/python -m pytest -q -o cache_dir=$(VENV)-$$version/cache"; \
	    $$suite $(ARGS) test_wsgate.py || { \
	        echo "== Python $$version: what failed, once more"; \
	        $$suite --last-failed $(ARGS) test_wsgate.py; }; \
	done; echo "passed on:$$done"

# Everything compiles; the sample configuration is valid and matches the tables of keys.
SCRIPTS = wsgate.py test_wsgate.py .ci/bench .ci/interop
COMPILE = import pathlib, sys; \
          [compile(pathlib.Path(name).read_bytes(), name, "exec") for name in sys.argv[1:]]
lint:
	$(PYTHON) -W error -c '$(COMPILE)' $(SCRIPTS)
	$(PYTHON) .ci/bench --help >/dev/null
	$(PYTHON) .ci/interop --help >/dev/null
	bash -n .ci/run
	$(PYTHON) wsgate.py -c wsgate.ini -t
	$(PYTHON) wsgate.py --print-config | diff - wsgate.ini

bench:
	$(PYTHON) .ci/bench $(ARGS)

# make test runs these two for half a second.
fuzz: $(VENV)/ready
	FUZZ_SECONDS=300 $(VENV)/bin/python -m pytest -q -k no_bytes_of_either_side test_wsgate.py

soak: $(VENV)/ready
	SOAK_SECONDS=600 $(VENV)/bin/python -m pytest -q -k soak test_wsgate.py

interop:
	$(PYTHON) .ci/interop $(ARGS)

clean:
	rm -rf .venv .venv-* __pycache__ .pytest_cache
