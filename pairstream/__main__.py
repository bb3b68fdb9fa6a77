import sys

from pairstream.cli import main

sys.exit(main())
