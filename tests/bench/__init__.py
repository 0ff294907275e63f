"""The benchmark: `make bench`. A package, so that the tests can import it."""
