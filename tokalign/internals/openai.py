"""openai's HTTP library (run with openai 2.25.0, 3.54.0 and 3.57.0).

The client of openai 2 stands on httpx, that of openai 3 on httpx2. Held by tests/contracts/test_openai.py.
"""

from __future__ import annotations

import sys
from typing import Any

import openai

# Found through the client that openai makes of that library's, so that neither has to be installed by name.
http: Any = sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]
