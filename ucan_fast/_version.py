"""The one place that states the version. Imports nothing: the build reads it without torch."""

__version__ = "0.1.0"
