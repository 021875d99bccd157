# make demo    set up, train DeepLabV3 on drawn data: dense, with CSG and narrow; print the comparison, look at an image
# make test    set up and run the tests; CSG_SEG_DATA=FOLDER adds those on real images
# make check-full   the long checks too
# make docs    build the documentation site into docs/_build/html
# make lint    ruff and mypy

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP_INSTALL := PIP_CONSTRAINT=constraints.txt $(RUN) -m pip install --disable-pip-version-check -q
DEMO := configs/demo
NAME := deeplabv3_r18-d8-w32_drawn-voc-64x64.py

.PHONY: demo test check-full docs lint clean

demo: $(VENV)/mm.installed
	$(RUN) tools/dataset_converters/draw_voc.py data/drawn --size 64
	$(RUN) tools/compare.py $(DEMO)/$(NAME) $(DEMO)/csg-6x_$(NAME) --narrow $(DEMO)/$(subst w32,w13,$(NAME)) \
		--work-dir work_dirs/demo --out work_dirs/demo/result.json --overwrite
	$(VENV)/bin/csg-seg demo data/drawn/VOC2012/JPEGImages/val_00045.jpg work_dirs/demo/csg.safetensors \
		--scale 6 --out work_dirs/demo/seen.png --overwrite

test: $(VENV)/dev.installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m 'not full' -n 2 --dist loadfile --no-loadscope-reorder

check-full: $(VENV)/dev.installed
	$(RUN) -m pytest -m 'full or not full'

docs: $(VENV)/dev.installed
	$(RUN) -m sphinx -W --keep-going -q docs docs/_build/html

lint: $(VENV)/dev.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) work_dirs data/drawn docs/_build

$(VENV)/mm.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing csg_seg, PyTorch and the mm packages into $(VENV) (about 5 GB, a few minutes)'
	$(PIP_INSTALL) -e '.[mm]'
	touch $@

$(VENV)/dev.installed: $(VENV)/mm.installed
	$(PIP_INSTALL) -e '.[mm,data,onnx,docs,dev]'
	touch $@
