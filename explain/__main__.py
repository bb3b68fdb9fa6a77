import sys

from explain.cli import main
from pairstream.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage(main, sys.argv[1:]))
