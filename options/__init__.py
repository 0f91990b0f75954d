"""The command line: `arguments` has the flags one by one, `meaning` what they say together.

No torch, and no file is read: everything here is decided from the arguments and the protocol alone.
"""

from options.arguments import parse
from options.meaning import Job, resolve

__all__ = ["Job", "parse", "resolve"]
