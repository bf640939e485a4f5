# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA := datasets/fashion_mnist

.DEFAULT_GOAL := help
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*##.*/\1/p' $(firstword $(MAKEFILE_LIST)))

help:  ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-22s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## environment, data, and the whole pipeline on Fashion-MNIST (15 minutes on 2 cores)
	$(BIN)/python -m data.fashion_mnist out=$(DATA)
	$(BIN)/python -m pipeline.run stage=all config=fashion_mnist run_dir=runs/demo

test: $(VENV)/.installed  ## the test suite (10 to 16 minutes on 2 cores)
	$(BIN)/python -m pytest -n 3 --dist loadfile -m "not slow"

test-slow: $(VENV)/.installed  ## the tests that take longer: whole runs killed, the documents' commands, several training processes (30 to 40 minutes); paths='FILE FOLDER' picks
	$(BIN)/python -m pytest -n 3 --dist loadfile -m "slow and not exhaustive and not alone" $(paths)
	$(BIN)/python -m pytest -m "alone"

test-exhaustive: $(VENV)/.installed  ## every bit of a label file, and any damage of any file under every command (up to an hour)
	$(BIN)/python -m pytest -m exhaustive

check: $(VENV)/.installed  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed  ## apply the formatter and the linter's fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

chaos: $(VENV)/.installed  ## kill, stop and starve the label stage, and count its labels (half an hour); faults=NAME,NAME picks
	$(BIN)/python -m tests.chaos $(if $(faults),faults=$(faults))

chaos-train: $(VENV)/.installed  ## kill and stop a student's training, in one process and in two, and compare its bytes (15 minutes); faults=NAME,NAME picks
	$(BIN)/python -m tests.chaos_train $(if $(faults),faults=$(faults))

bench: $(VENV)/.installed  ## all benchmarks of speed, and one table (half an hour; the machine must be quiet); names=NAME,NAME picks
	$(BIN)/python -m benchmarks $(if $(names),names=$(names))

bench-accuracy: $(VENV)/.installed  ## teacher, student and ablations over 3 seeds (hours; resumes); labels_per_class=25|50|100
	$(BIN)/python -m benchmarks.bench_accuracy labels_per_class=$(or $(labels_per_class),50)

bench-pretrain: $(VENV)/.installed  ## what self-supervised pretraining gains the demo's teacher, 3 seeds (hours; resumes); seeds=0,1 objectives=simclr,byol
	$(BIN)/python -m benchmarks.bench_pretrain $(if $(seeds),seeds=$(seeds)) $(if $(objectives),objectives=$(objectives))

bench-suggest: $(VENV)/.installed  ## 100 suggested labels against 100 random ones, student's accuracy, 3 seeds (hours; resumes); seeds=0,1 labels=100
	$(BIN)/python -m benchmarks.bench_suggest $(if $(seeds),seeds=$(seeds)) $(if $(labels),labels=$(labels))

bench-label: $(VENV)/.installed  ## labeling: host path beside its peers, decoder, real model, memory, scheduling, resume (20 minutes)
	$(BIN)/python -m benchmarks.bench_label
	$(BIN)/python -m benchmarks.bench_decoder
	$(BIN)/python -m benchmarks.bench_label_model
	$(BIN)/python -m benchmarks.bench_label_flow
	$(BIN)/python -m benchmarks.bench_pool
	$(BIN)/python -m benchmarks.bench_label_bytes
	$(BIN)/python -m benchmarks.bench_resume
	$(BIN)/python -m benchmarks.bench_footers

bench-select: $(VENV)/.installed  ## selecting from 130 million label rows, beside DuckDB and Polars (10 minutes, 5 GB of disk); rows=N for fewer
	$(BIN)/python -m benchmarks.bench_select $(if $(rows),rows=$(rows))

bench-pseudo-labels: $(VENV)/.installed  ## which pseudo-labels teach best: top-k, rules of selection (3 seeds; 2 hours; resumes)
	$(BIN)/python -m benchmarks.bench_pseudo_labels

bench-loader: $(VENV)/.installed  ## the training input per core, beside timm and torchvision (3 minutes)
	$(BIN)/python -m benchmarks.bench_loader

bench-remote: $(VENV)/.installed  ## training, labeling, export from an object store that answers after 30 and 100 ms, beside disk and webdataset (10 minutes)
	$(BIN)/python -m benchmarks.bench_remote
	$(BIN)/python -m benchmarks.bench_remote_stages

bench-train: $(VENV)/.installed  ## training steps beside timm's script, with synthetic data and under Ray Train (6 minutes)
	$(BIN)/python -m benchmarks.bench_train

bench-ray-train: $(VENV)/.installed  ## what Ray Train adds to a training step, to a percent (25 minutes)
	$(BIN)/python -m benchmarks.bench_ray_train

bench-gpu: $(VENV)/.installed  ## what only a GPU shows: its tests, labeling and training beside timm, memory, torch.compile; call again to continue
	$(BIN)/python -m benchmarks.gpu $(if $(parts),parts=$(parts)) $(if $(models),models=$(models))

bench-ablate: $(VENV)/.installed  ## which of ResNet-RS's findings show on Fashion-MNIST: both studies, 3 seeds (the first 50 minutes on 2 cores, both not timed; resumes)
	$(BIN)/python -m benchmarks.bench_ablate $(if $(seeds),seeds=$(seeds))

bench-scaling: $(VENV)/.installed  ## width, depth, image size and length on Fashion-MNIST, 2 seeds (hours; under an hour a call; resumes); seeds=N minutes=N
	$(BIN)/python -m benchmarks.bench_scaling $(if $(seeds),seeds=$(seeds)) $(if $(minutes),minutes=$(minutes))

bench-noisy-student: $(VENV)/.installed  ## Noisy Student's ablations on Fashion-MNIST, 2 seeds (40 minutes expected on 2 free cores; resumes); seeds=N steps=N
	$(BIN)/python -m benchmarks.bench_noisy_student $(if $(seeds),seeds=$(seeds)) $(if $(steps),steps=$(steps))

bench-fixmatch: $(VENV)/.installed  ## FixMatch beside the student: the same network, images and compute, 3 seeds (hours; resumes)
	$(BIN)/python -m benchmarks.bench_fixmatch $(if $(seeds),seeds=$(seeds))

bench-surprise: $(VENV)/.installed  ## recipe=small on drawn problems that nobody tuned for (under an hour a call; resumes); seeds=0,1 labels=10,30
	$(BIN)/python -m benchmarks.bench_surprise $(if $(seeds),seeds=$(seeds)) $(if $(labels),labels=$(labels))

bench-pareto: $(VENV)/.installed  ## ResNet-RS and EfficientNet at the paper's sizes: counted, timed, and on one plot (10 minutes); batch=N gflops=N
	$(BIN)/python -m benchmarks.bench_pareto $(if $(batch),batch=$(batch)) $(if $(gflops),gflops=$(gflops))

bench-transfer: $(VENV)/.installed  ## which features serve other data sets: supervised, RS, SimCLR, student, scratch on four sets (hours; under an hour a call; resumes)
	$(BIN)/python -m benchmarks.bench_transfer $(if $(seeds),seeds=$(seeds)) $(if $(minutes),minutes=$(minutes))

bench-near-duplicates: $(VENV)/.installed  ## copies of held-out images: what is found, and what is taken for one
	$(BIN)/python -m benchmarks.bench_near_duplicates

bench-pack: $(VENV)/.installed  ## packing a folder of photos, beside tar, webdataset as img2dataset uses it, and decoding alone (5 minutes, 4 GB of disk)
	$(BIN)/python -m benchmarks.bench_pack $(if $(images),images=$(images))

bench-export: $(VENV)/.installed  ## writing shards with labels, beside tar copying the same images
	$(BIN)/python -m benchmarks.bench_export

bench-serve: $(VENV)/.installed  ## 64 clients streaming at once: exported shards beside nginx, and joined ones (2 minutes); nginx=PATH
	$(BIN)/python -m benchmarks.bench_serve $(if $(nginx),nginx=$(nginx))

release: $(VENV)/.installed  ## sdist and wheel, installed into a bare environment that runs the demo (20 minutes, 7 GB more)
	rm -rf dist build/bare && $(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv build/bare
	build/bare/bin/pip install --quiet --constraint constraints.txt "$$(echo dist/*.whl)[train]"
	cd build && bare/bin/python -m data.fashion_mnist out=$(DATA)
	cd build && bare/bin/python -m pipeline.run stage=all config=fashion_mnist run_dir=runs/demo

clean:  ## remove the environment, runs and data
	rm -rf $(VENV) runs datasets build dist
