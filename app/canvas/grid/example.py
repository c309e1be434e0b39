"""A page of one's own with the grid: `streamlit run app/canvas/grid/example.py`, from the repository's root."""

import streamlit as st

from app.canvas.drawing import known_cells, levels_of
from app.canvas.grid import drawing_grid

levels = st.slider("Levels", 2, 16, 4)
drawing = drawing_grid((16, 24), key="sketch", levels=levels, known="touched", live=True, brush=3)
ink, known = levels_of(drawing, levels), known_cells(drawing, "touched", levels)
st.write(f"{(ink > 0).sum()} cells of ink, {known.sum()} known")
