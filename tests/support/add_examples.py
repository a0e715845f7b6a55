"""Importing this makes the files of examples/ importable by their bare names, as they import each other."""

import sys

from paths import EXAMPLES

if str(EXAMPLES) not in sys.path:
    sys.path.append(str(EXAMPLES))  # last, so that no file there hides a library
