//! Boots in QEMU: the harness, and the end-to-end tests that use it.
