"""The result of the `pairs` stage in numbers and pictures: counts, histograms, hosts, and a contact sheet."""
