"""Measurements, run by hand; nothing in the packages imports them, and they are not installed.

- `make bench`: the samplers, by `python -m pixelcnn bench`; then `benchmarks.plot`, tables and a picture of it.
- `benchmarks.training`: a step of the trainer against a plain training loop.
- `benchmarks.service`: latency and throughput of a running service.
- `benchmarks.canvas`: the running page, as a hand feels it.
- `benchmarks.interrupts`: how long `make demo` takes to end after Ctrl-C.
- `benchmarks.overhead`: what MLflow, Prefect and DVC add to a training.
- `benchmarks.sizes`: sizes and settings of pairs, compared at equal time: docs/sizes.md.
- `benchmarks.endings`, `.drawings`, `.letters`: which endings judges accept: pages of these names, own_pictures.md.
- `benchmarks.own`: what `make own` makes of several kinds of pictures.
- `benchmarks.packing`, `.ranking`: against other codecs, and by AUROC: docs/packing.md, ranking.md.
- `benchmarks.watching`: what log lines, metrics and the watch on drawings cost an answer.
"""
