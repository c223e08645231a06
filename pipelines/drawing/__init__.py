"""Pictures and text for people.

charts                  loss curves and histograms as SVG, by matplotlib
grids                   pictures in rows, with captions
html, macros.html.j2    pages from the templates beside the code
sections                what the stages' sections of the report have in common
formatting, printable   numbers as people read them; text from the web made harmless
"""
