import sys

from pairstream.cli import run_stage
from serve.cli import main

if __name__ == "__main__":
    sys.exit(run_stage(main, sys.argv[1:]))
