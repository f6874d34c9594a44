#!/bin/sh
# Runs every target for a few seconds with the stable compiler: coverage guided, without AddressSanitizer (the code
# under test has no unsafe blocks). For long runs use `cargo +nightly fuzz run TARGET`.
#
# usage: ./smoke.sh [SECONDS [TARGET…]]
set -eu
cd "$(dirname "$0")"
seconds=${1:-10}
[ $# -gt 0 ] && shift
# shellcheck disable=SC2046 # names without spaces
[ $# -gt 0 ] || set -- $(sed -n 's/^name = "\(.*\)"$/\1/p' Cargo.toml | grep -v '^stiefel-fuzz$')
target=$(rustc -vV | sed -n 's/^host: //p')
# Given here, the flags replace those of the workspace's .cargo/config.toml: a fuzzer is not linked statically.
export RUSTFLAGS="--cfg fuzzing -C passes=sancov-module -C codegen-units=1 \
  -C llvm-args=-sanitizer-coverage-level=4 -C llvm-args=-sanitizer-coverage-inline-8bit-counters \
  -C llvm-args=-sanitizer-coverage-pc-table -C llvm-args=-sanitizer-coverage-trace-compares"
cargo build --release --quiet --target "$target" --target-dir target/smoke
for name; do
    mkdir -p "corpus-work/$name" "seeds/$name" artifacts
    echo "== $name"
    "target/smoke/$target/release/$name" -max_total_time="$seconds" -rss_limit_mb=512 -timeout=5 -print_final_stats=0 \
        -verbosity=0 -print_funcs=0 -artifact_prefix="artifacts/$name-" "corpus-work/$name" "seeds/$name"
done
