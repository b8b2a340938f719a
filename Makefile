.PHONY: run demo test compat lint bench fuzz soak interop clean

PYTHON ?= python3
VENV = .venv
# The pip that comes with Python 3.6 does not find by itself what was the last for it.
PYTEST_36 = pytest==7.0.1 pluggy==1.0.0 iniconfig==1.1.1 attrs==22.2.0 packaging==21.3 pyparsing==3.0.9 \
            importlib-metadata==4.8.3 tomli==1.2.3 py==1.11.0 zipp==3.6.0 typing-extensions==4.1.1
PICK = import sys; print("$(PYTEST_36)" if sys.version_info < (3, 7) else "pytest")
install_pytest = $(1) -m pip install --quiet --disable-pip-version-check $$($(1) -c '$(PICK)')

# The gate with ./wsgate.ini; ARGS="-c other.ini" for another file.
run:
	$(PYTHON) wsgate.py $(ARGS)

demo:
	$(PYTHON) wsgate.py --demo

# pytest goes into a virtual environment of its own; nothing else is installed.
$(VENV)/ready:
	$(PYTHON) -m venv $(VENV)
	$(call install_pytest,$(VENV)/bin/python)
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
	        $(call install_pytest,$(VENV)-$$version/bin/python); \
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
