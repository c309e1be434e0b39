"""Measurements, run by hand; nothing in the packages imports them, and they are not installed.

- `make bench`: the samplers, by `python -m pixelcnn bench`; then `benchmarks.plot`, tables and a picture of it.
- `benchmarks.training`: a step of the trainer against a plain training loop.
- `benchmarks.service`: latency and throughput of a running service.
- `benchmarks.canvas`: the running page, as a hand feels it.
- `benchmarks.interrupts`: how long `make demo` takes to end after Ctrl-C.
- `benchmarks.overhead`: what MLflow, Prefect and DVC add to a training.
- `benchmarks.train_all`: several trainings at once.
- `benchmarks.sizes`: sizes and settings of pairs, compared at equal time: docs/sizes.md.
"""
