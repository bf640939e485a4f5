"""Tests; the folders mirror the packages."""

HANGS_S = 1_500.0  # after which a process, thread or connection of a test counts as hanging. Says nothing of speed: machines are busy
