"""Programs for those who change the project.

- `tools.faults`: processes killed at their worst moments, a rerun, and a table of what was wrong.
- `tools.pictures`: the pictures of the docs, from a running demo.
- `tools.write_examples`: app/canvas/examples/, the test images that stand below the grid.
- `tools.write_golden`: tests/golden/core.yaml, what tiny networks with fixed seeds compute.
- `tools.write_released`: tests/released/, the images that the released weights are checked on.
"""
