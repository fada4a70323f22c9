# `make demo` and `make test` need Python 3.11 or later and nothing else; both work in .venv.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
SERVE := .venv-serve
FLOORS := .venv-floors
RUNTIME_TESTS := $(addprefix tests/test_,$(addsuffix .py, \
	bench cli derain errors images info manifest ort pipeline robustness session tiling trt video))

.PHONY: demo test floors-test serve-test clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# From the shipped checkpoint to a proven ONNX model, a TensorRT engine and derained images, without a GPU.
demo: .venv/installed
	$(BIN)/python -m export.onnx --weights weights/drsformer-xs.safetensors --output $(DEMO)/drsformer-xs.onnx
	$(BIN)/python -m export.tensorrt --onnx $(DEMO)/drsformer-xs.onnx --output $(DEMO)/bundle
	$(BIN)/python -m drsformer.rain docs/photographs $(DEMO)/rain --strength 0.4 --seed 2
	$(BIN)/python -m export.validate --reference weights/drsformer-xs.safetensors --candidate $(DEMO)/bundle \
		--data $(DEMO)/rain --max-drop-db 0.01 --min-psnr 50 --report $(DEMO)/report.html --record
	$(BIN)/python -m runtime.derain $(DEMO)/rain/input $(DEMO)/derained --model $(DEMO)/bundle
	$(BIN)/python -m runtime.info $(DEMO)/bundle
	@echo
	@echo "The proof:  $(DEMO)/report.html"
	@echo "The images: $(DEMO)/rain/input (rainy)  $(DEMO)/derained (restored)  $(DEMO)/rain/target (clean)"
	@echo "The bundle: $(DEMO)/bundle, the model and an engine for RTX cards, with their manifest"

# The oldest versions of its dependencies that the runtime takes, which are in its pyproject.toml.
floors-test: $(FLOORS)/installed
	$(FLOORS)/bin/python -m pytest $(RUNTIME_TESTS)

$(FLOORS)/installed: runtime/pyproject.toml constraints-floors.txt
	$(PYTHON) -m venv $(FLOORS)
	$(FLOORS)/bin/pip install --quiet --constraint constraints-floors.txt --editable './runtime[cli,report,sign,video]' \
		pytest hypothesis onnx
	touch $@

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/pytest -n auto --dist loadfile

# A Triton server on the CPU, well and badly treated. In an environment of its own: nvidia-pytriton wants older versions.
$(SERVE)/installed: pyproject.toml runtime/pyproject.toml constraints-serve.txt
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/pip install --quiet --constraint constraints-serve.txt --editable . --editable ./runtime \
		nvidia-pytriton
	touch $@

serve-test: $(SERVE)/installed .venv/installed
	$(BIN)/python -m export.onnx --weights weights/drsformer-xs.safetensors --output $(DEMO)/several.onnx --batch any
	$(SERVE)/bin/python -m tests.serve --several $(DEMO)/several.onnx

clean:
	rm -rf .venv $(FLOORS) $(SERVE) $(DEMO) runtime/build
