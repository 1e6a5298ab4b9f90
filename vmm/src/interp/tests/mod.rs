//! Unit tests of the interpreter, on the flat bus.
