"""Tests of what needs a GPU. They share no fixtures with others, because a bare GPU machine runs them (benchmarks.gpu)."""
