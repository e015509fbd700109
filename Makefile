# `make help` lists what there is. Each target does its own set-up in .venv.

PYTHON ?= python3.11
PROFILE ?= quick
VENV := .venv
BIN := $(VENV)/bin
BUILT := build/notebooks/$(PROFILE)
RETRAINED := $(if $(filter-out 0 no false False,$(RETRAIN)),True,False)

# The teaching chapters show images: the embedded ones with PROFILE=quick, else Omniglot, from DATA.
# The figure chapters need images only to train: with records they draw from those, in seconds. The
# chapter on one's own tasks makes them itself, the one on performance draws from its record alone.
TEACHING := 01_tasks 02_maml 03_hypergradients 04_alpha_maml
FIGURES := 05_figure_1 06_figures_2_3 07_appendix_figures 08_mechanism 09_tuning \
	10_claims 13_scale_free use_it
OWN := 11_your_own
RECORDED := 12_performance
EXECUTED := $(if $(DATA)$(filter quick,$(PROFILE)),$(TEACHING)) $(FIGURES) $(OWN) $(RECORDED)

# make's functions take a path with spaces for several: here each space is a ␣ in between.
ifdef DATA
space := $(subst ,, )
home := $(subst $(space),␣,$(HOME))
path := $(patsubst ~/%,$(home)/%,$(subst $(space),␣,$(DATA)/))
export AMAML_DATA := $(subst ␣,$(space),$(abspath $(path)))
endif

# What is misspelt must not be passed over: make RETRIAN=1, or a parameter that a notebook has not.
OPTIONS := PROFILE DATA RETRAIN SECONDS SEED PYTHON VENV
GIVEN := $(foreach name,$(.VARIABLES),$(if $(findstring command,$(origin $(name))),$(name)))
ifneq ($(filter-out $(OPTIONS),$(GIVEN)),)
$(error $(filter-out $(OPTIONS),$(GIVEN)) is unknown: give $(OPTIONS))
endif
ifeq ($(filter quick medium paper,$(PROFILE)),)
$(error PROFILE=$(PROFILE) is unknown: give quick, medium or paper)
endif

.PHONY: figures test fuzz bench lab book notebooks clean help
.DEFAULT_GOAL := help

help:  ## list these commands
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 18
	@echo
	@echo "  PROFILE=quick    small runs on embedded data, trained from nothing (the default)"
	@echo "  PROFILE=medium   Omniglot, from the committed records"
	@echo "  PROFILE=paper    the original sizes, from records that a GPU has to make first: chapter 12"
	@echo "  DATA=folder      where Omniglot is: images_background and images_evaluation, zip or folder"
	@echo "  RETRAIN=1        with figures: train again what has records"

$(VENV)/installed: requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

figures: $(VENV)/installed  ## execute the notebooks and draw their figures, by PROFILE
	@mkdir -p $(BUILT)
	@set -e; for chapter in $(EXECUTED); do \
		echo "-- $$chapter ($(PROFILE))"; \
		parameters="profile=$(PROFILE)"; options=; \
		case " $(FIGURES) " in *" $$chapter "*) parameters="$$parameters retrain=$(RETRAINED)";; esac; \
		for parameter in $$parameters; do \
			grep -q "\"$${parameter%=*} = " book/$$chapter.ipynb || \
				{ echo "$$chapter has no parameter $${parameter%=*}" >&2; exit 1; }; \
			options="$$options -p $${parameter%=*} $${parameter#*=}"; \
		done; \
		$(BIN)/papermill --cwd book --no-progress-bar --log-level WARNING \
			$$options book/$$chapter.ipynb $(BUILT)/$$chapter.ipynb; \
	done
	@echo "executed notebooks: $(BUILT)"
	@echo "pictures:           figures/$(PROFILE)"
	@ls figures/$(PROFILE)/*.png

# Without DATA (or AMAML_DATA) the outputs that show Omniglot are not compared: book/conftest.py.
test: $(VENV)/installed  ## lint, types, the module's tests, the notebooks' outputs and pairs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -rs \
		--cov=amaml --cov-report=term --cov-fail-under=95 --ignore tests/book/test_pairs.py tests
	@printf '%s\n' book/*.ipynb | OMP_NUM_THREADS=1 xargs -P 2 -n 1 $(BIN)/python -m pytest -q \
		--nbval --nbval-current-env --nbval-kernel-startup-timeout=120 -p no:cacheprovider
	$(BIN)/python -m pytest -q tests/book/test_pairs.py

fuzz: $(VENV)/installed  ## damage files at random, for SECONDS=600, from SEED=0
	OMP_NUM_THREADS=1 AMAML_FUZZ_SECONDS=$(or $(SECONDS),600) AMAML_FUZZ_SEED=$(or $(SEED),0) \
		$(BIN)/python -m pytest -q tests/faults/test_fuzz.py

bench: $(VENV)/installed  ## measure speed and memory: six minutes on two idle cores
	$(BIN)/python -m benchmarks.bench

lab: $(VENV)/installed  ## open the book in JupyterLab
	$(BIN)/jupyter lab book --port 8877

book: $(VENV)/installed  ## build the pages from the committed notebooks, as they are
	@mkdir -p build
	@$(BIN)/jupyter-book build . --toc book/_toc.yml --path-output build --all -W --keep-going --quiet \
		> build/book.log 2>&1 || { cat build/book.log; exit 1; }
	@echo "pages: build/_build/html/index.html"

notebooks: $(VENV)/installed  ## execute every chapter's .md into its .ipynb, with Omniglot from DATA
	@set -e; for chapter in $(TEACHING) $(FIGURES) $(OWN) $(RECORDED); do \
		$(BIN)/jupytext --to md:myst book/$$chapter.md; \
		$(BIN)/jupytext --to ipynb --execute book/$$chapter.md; \
	done

clean:  ## remove what was built or is of PROFILE=quick; runs/ and other records stay
	rm -rf build figures/quick figures/records/*-quick.*
