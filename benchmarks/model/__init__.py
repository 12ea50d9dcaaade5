"""Whole passes: collecting over a data set, answering a deletion request, and how both grow.

``python -m benchmarks.model --profile quick`` prints the tables and writes one JSON file of
:mod:`benchmarks.measure`'s format. Groups: ``collect``, ``deletion``, ``scaling``; and
our rows of the last two as ratios to PEFT's plain pass, ``deletion_forward`` and
``scaling_forward``.
"""
