"""What came out of the `pairs` stage: counts, histograms, hosts, and a contact sheet."""
