"""`python -m pipeline.run`, recording the images of each step."""

import sys

from pipeline.run import main
from tests.chaos_train import recorded

if __name__ == "__main__":
    recorded.record()
    sys.exit(main(sys.argv[1:]))
