"""Curvature of a loss: problem, operators, eigenpairs, spectra and traces; knows no layers and no training."""
