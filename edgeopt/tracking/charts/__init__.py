"""Prepare chart data once and draw it with Plotly, Matplotlib or as SVG."""
