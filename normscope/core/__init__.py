"""The nouns: site, record, store, estimate, finding, figure, source, survey, schedule, errors. Knows no torch."""
