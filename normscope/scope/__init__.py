"""The verbs: attach."""
