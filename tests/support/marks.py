"""Marks of tests that need a part which not every machine has."""

import pytest

from adapters.serving import cpu_operators

needs_vnni = pytest.mark.skipif(not cpu_operators.has_int8(), reason="this CPU has no VNNI")
