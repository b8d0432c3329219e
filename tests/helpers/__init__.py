"""What test modules share; tests.launch, tests.layers, tests.tolerances and tests/ops/cases.py are the larger parts."""
