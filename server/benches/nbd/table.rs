//! The table of docs/nbd.md.

use super::client::{Kind, Load};
use super::servers::Kinds;
use super::{BLOCK, Measured};

type Results = Vec<Vec<Vec<Measured>>>;

/// What a row shows of one measurement, and how to compare: larger is better for speeds.
struct Figure {
    name: &'static str,
    larger: bool,
    of: fn(&Load, &Measured) -> f64,
}

fn figures(load: &Load) -> Vec<Figure> {
    let cpu = Figure {
        name: "server CPU s/GiB",
        larger: false,
        of: |_, m| m.cpu / (m.sample.bytes as f64 / f64::from(1 << 30)),
    };
    if load.size > BLOCK {
        let speed = Figure {
            name: "MiB/s",
            larger: true,
            of: |_, m| m.sample.bytes as f64 / f64::from(1 << 20) / m.sample.seconds,
        };
        return vec![speed, cpu];
    }
    if load.depth == 1 {
        let at = |name, of| Figure {
            name,
            larger: false,
            of,
        };
        return vec![
            at("p50 µs", |_, m| percentile(&m.sample.latencies, 0.5)),
            at("p99 µs", |_, m| percentile(&m.sample.latencies, 0.99)),
        ];
    }
    let rate = Figure {
        name: "kIOPS",
        larger: true,
        of: |_, m| m.sample.operations as f64 / m.sample.seconds / 1e3,
    };
    let cost = Figure {
        name: "server CPU µs/op",
        larger: false,
        of: |_, m| m.cpu * 1e6 / m.sample.operations as f64,
    };
    vec![rate, cost]
}

fn percentile(values: &[f32], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f32::total_cmp);
    let last = sorted.len().saturating_sub(1) as f64;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    sorted
        .get((last * part) as usize)
        .map_or(f64::NAN, |value| f64::from(*value))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// One measurement in a few words.
pub fn short(load: &Load, measured: &Measured) -> String {
    let parts = figures(load).into_iter().map(|figure| {
        let value = (figure.of)(load, measured);
        format!("{value:.3} {}", figure.name)
    });
    let words = parts.collect::<Vec<_>>().join(", ");
    format!(
        "{words}, {:.1} MiB{}",
        measured.memory,
        if load.kind == Kind::Read { "" } else { " (writes)" }
    )
}

/// Medians per server; ours against the best peer of each row, as the median of the rounds' ratios (above 1: we lead).
pub fn print(kinds: &[Kinds], rows: &[&(&str, Load)], results: &Results) {
    for kind in kinds.iter().skip(1) {
        println!("{}: {}", kind.name, kind.version());
    }
    let names: Vec<_> = kinds.iter().map(|kind| kind.name).collect();
    println!(
        "\n| row | {} | against the best |\n|---|{}",
        names.join(" | "),
        "---|".repeat(kinds.len() + 1)
    );
    for ((name, load), results) in rows.iter().zip(results) {
        for figure in figures(load) {
            let of = |measured: &Measured| (figure.of)(load, measured);
            let shown: Vec<_> = results
                .iter()
                .map(|rounds| number(median(rounds.iter().map(of).collect())))
                .collect();
            let ratio = |server: usize| {
                let pairs = results[0].iter().zip(&results[server]);
                median(
                    pairs
                        .map(|(ours, theirs)| {
                            let ratio = of(ours) / of(theirs);
                            if figure.larger { ratio } else { 1.0 / ratio }
                        })
                        .collect(),
                )
            };
            let worst = (1..kinds.len()).map(ratio).fold(f64::INFINITY, f64::min);
            println!("| {name}, {} | {} | {worst:.2} |", figure.name, shown.join(" | "));
        }
    }
    let memory = (0..kinds.len()).map(|server| {
        let peaks = results
            .iter()
            .flat_map(|row| row[server].iter().map(|measured| measured.memory));
        number(peaks.fold(0.0, f64::max))
    });
    println!("| peak memory, MiB | {} | |", memory.collect::<Vec<_>>().join(" | "));
}

fn number(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.3}")
    }
}
