"""Pictures and text for people: charts (SVG), grids (PNG), the parts of report sections, and formatted numbers."""
