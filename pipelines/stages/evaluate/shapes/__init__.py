"""A detector of coloured shapes: what a generated picture shows, read back from its pixels without any learned part.

It can judge data sets that are drawn in its vocabulary (`outlines`), such as the demo's; on others it says nothing.
"""
