"""Metrics: Record -> Estimate, or a tidy frame with one Estimate a row; one file per subject. Knows no torch."""
