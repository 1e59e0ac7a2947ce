"""`python -m recipe COMMAND` is the same as `recipe COMMAND`."""

import sys

from recipe.cli import main

if __name__ == "__main__":
    sys.exit(main())
