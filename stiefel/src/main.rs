//! The `stiefel` command.

fn main() {}
