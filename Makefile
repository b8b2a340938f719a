.PHONY: run demo test compat lint bench fuzz soak interop clean

PYTHON ?= python3
VENV = .venv
# pip of Python 3.6 must be told which pytest is the last for it.
PIP = -m pip install --quiet --disable-pip-version-check 'pytest; python_version >= "3.7"' 'pytest < 7.1; python_version < "3.7"'

# The gate with ./wsgate.ini; ARGS="-c other.ini" for another file.
run:
	$(PYTHON) wsgate.py $(ARGS)

demo:
	$(PYTHON) wsgate.py --demo

# pytest goes into a virtual environment of its own; nothing else is installed.
$(VENV)/ready:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP)
	touch $@

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -q $(ARGS) test_wsgate.py

# The suite under every python3.x that is found, in PATH and in ~/.pyenv/versions.
compat:
	@set -e; done=""; \
	for python in $$(ls $(HOME)/.pyenv/versions/3.*/bin/python 2>/dev/null) \
	              $$(for minor in 6 7 8 9 10 11 12 13 14; do command -v python3.$$minor || true; done); do \
	    version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	    case " $$done " in *" $$version "*) continue;; esac; done="$$done $$version"; \
	    echo "== Python $$version"; \
	    test -e $(VENV)-$$version/ready || { $$python -m venv $(VENV)-$$version; \
	        $(VENV)-$$version/bin/python $(PIP); \
	        touch $(VENV)-$$version/ready; }; \
	    $(VENV)-$$version/bin/python -m pytest -q -p no:cacheprovider $(ARGS) test_wsgate.py; \
	done; echo "passed on:$$done"

# Every file compiles, the sample configuration is good and is what the tables say.
lint:
	for file in *.py; do $(PYTHON) -W error -m py_compile $$file; done
	$(PYTHON) wsgate.py -c wsgate.ini -t
	$(PYTHON) wsgate.py --print-config | diff - wsgate.ini

bench:
	$(PYTHON) bench_wsgate.py $(ARGS)

# The fuzzer for five minutes, the soak for ten; make test runs both for seconds.
fuzz: $(VENV)/ready
	FUZZ_SECONDS=300 $(VENV)/bin/python -m pytest -q -k no_bytes_of_either_side test_wsgate.py

soak: $(VENV)/ready
	SOAK_SECONDS=600 $(VENV)/bin/python -m pytest -q -k soak test_wsgate.py

# Real clients, servers and a browser, in a throwaway environment.
interop:
	$(PYTHON) .ci/interop $(ARGS)

clean:
	rm -rf .venv .venv-* __pycache__ .pytest_cache
