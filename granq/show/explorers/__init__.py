"""Explorers: Altair charts that a notebook or an HTML file draws without a kernel, one function a chart."""
