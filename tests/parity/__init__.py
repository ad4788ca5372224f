"""tinygpt against the numpy reference, value by value, on the backend that DEV names.

    DEV=CL python -m pytest tests/parity

`compare` says what counts as equal and how a difference is told; `models` puts the same weights
into both. The last lines of a run give the largest relative errors it met.
"""
