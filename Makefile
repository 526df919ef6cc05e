# Two commands: `make demo` and `make test`. Every target makes its own .venv first.
PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
INI := settings.ini constraints.txt setup.py
RUN := $(BIN)/python tests/runner.py run

.PHONY: demo test lab run new bench docs export readme clean hooks

demo: .venv/.dev  ## move one photograph's colors onto another; print the table and where the figure is
	@$(RUN) --keep --show demo nbs/apps/color_transfer.ipynb
	@$(BIN)/nbdev_clean
	@echo figures/color_transfer.png

test: .venv/.dev  ## every test; every notebook is executed and compared with its stored outputs
	$(BIN)/pytest -n $(JOBS)

lab: .venv/.dev  ## open the notebooks
	$(BIN)/jupyter lab nbs

run: .venv/.dev  ## make run NB=nbs/core/00_kernels.ipynb: execute in a fresh kernel and store the outputs
	$(RUN) $(NB)

new: .venv/.dev  ## make new NAME=core/10_foo: start a notebook from the template
	@$(BIN)/python tests/authoring.py new $(NAME)

bench: .venv/.bench  ## measure again; the saved results are what the benchmark notebooks show
	OT_BENCH=1 $(RUN) --timeout 7200 $(wildcard nbs/benchmarks/b*.ipynb)

docs: .venv/.docs  ## the site, in _docs/html
	$(BIN)/python tests/authoring.py docs
	$(BIN)/sphinx-build -q _proc _docs/html
	@echo _docs/html/index.html

export: .venv/.dev  ## notebooks to ot_research, and without stray metadata
	@$(BIN)/nbdev_export
	@$(BIN)/nbdev_clean

readme: .venv/.dev  ## nbs/index.ipynb to README.md
	@$(BIN)/python tests/authoring.py readme

hooks: .venv/.dev  ## once a clone: let git merge notebooks cell by cell
	git config merge.nbdev-merge.name "merge notebooks cell by cell"
	git config merge.nbdev-merge.driver "$(BIN)/nbdev_merge %O %A %B %P"

clean:  ## remove what was built; .venv stays
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .hypothesis

.venv/.dev: $(INI)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[notebooks,data,test]'
	$(BIN)/pip install --quiet --no-deps -c constraints.txt fcsparser g2p-en
	@touch $@

.venv/.bench .venv/.docs: .venv/.%: .venv/.dev
	$(BIN)/pip install --quiet -c constraints.txt -e '.[$*]'
	@touch $@
