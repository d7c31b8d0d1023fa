"""The only place that uses private parts of other libraries: one module per library.

Each entry says what it does, why the public way is not enough, and which test fails when the
library changes it.
"""
