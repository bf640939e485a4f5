"""What a GPU alone can show, in one command: `python -m benchmarks.gpu`."""
