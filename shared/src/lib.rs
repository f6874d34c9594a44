//! Configuration, keys, units and wire formats: parses bytes, opens nothing.
