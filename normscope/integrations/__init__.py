"""Integrations: normscope inside training frameworks and trackers, thin, each imported only when asked for."""
