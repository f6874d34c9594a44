//! What is measured, how the machine that measures says it, and what is made of it.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};

/// How the two machines reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// By the NICs themselves.
    Bare,
    /// Inside WireGuard.
    Tunnel,
}

/// How the disk travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    /// No disk: TCP with the same pattern, the most that a disk could have.
    Tcp,
    /// Debian's `nbd-server` and `nbd-client`.
    NbdClient,
    /// Our NBD server, and the kernel's client as our program sets it up.
    Nbd,
    /// The kernel's NVMe target and host, as our programs set them up.
    Nvme,
}

/// What is done with the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Measure {
    /// Reads of 1 MiB, one after the other.
    Read,
    /// Writes of 1 MiB, one after the other, and a flush at the end.
    Write,
    /// Reads of 4 KiB at random places, one after the other.
    Random1,
    /// The same from eight threads.
    Random8,
}

/// What begins each line for the host.
pub(crate) const MARK: &str = "bench: ";
/// What the desktop says behind it when all is measured.
pub(crate) const DONE: &str = "done";
/// What either says behind it when it cannot go on, before the reason.
pub(crate) const ERROR: &str = "ERROR ";
/// Words on the kernel's command line: which machine it is, how many rounds, seconds for each measurement.
pub(crate) const ROLE: &str = "bench.role=";
/// See [`ROLE`].
pub(crate) const ROUNDS: &str = "bench.rounds=";
/// See [`ROLE`].
pub(crate) const SECONDS: &str = "bench.seconds=";
/// The part of the disk that is used, in bytes from its beginning.
pub(crate) const SPAN: u64 = 128 << 20;
/// Bytes of a long and of a short request.
pub(crate) const LONG: usize = 1 << 20;
/// See [`LONG`].
pub(crate) const SHORT: usize = 4096;

impl Way {
    /// Both.
    pub(crate) const ALL: [Self; 2] = [Self::Bare, Self::Tunnel];

    /// One word.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::Tunnel => "tunnel",
        }
    }

    /// Where the laptop is.
    pub(crate) const fn laptop(self) -> Ipv6Addr {
        self.address(1)
    }

    /// Where the desktop is.
    pub(crate) const fn desktop(self) -> Ipv6Addr {
        self.address(2)
    }

    /// TCP port `port` of the laptop.
    pub(crate) fn at(self, port: u16) -> SocketAddr {
        (self.laptop(), port).into()
    }

    /// Unique local addresses (RFC 4193), one network each.
    const fn address(self, host: u16) -> Ipv6Addr {
        let network = match self {
            Self::Bare => 0x1e,
            Self::Tunnel => 0x1f,
        };
        Ipv6Addr::new(0xfd57, network, 0, 0, 0, 0, 0, host)
    }
}

impl Method {
    /// All, the reference first.
    pub(crate) const ALL: [Self; 4] = [Self::Tcp, Self::NbdClient, Self::Nbd, Self::Nvme];

    /// One word.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::NbdClient => "nbd-client",
            Self::Nbd => "nbd",
            Self::Nvme => "nvme",
        }
    }

    const fn title(self) -> &'static str {
        match self {
            Self::Tcp => "raw TCP",
            Self::NbdClient => "nbd-client + nbd-server",
            Self::Nbd => "stiefel, NBD",
            Self::Nvme => "stiefel, NVMe",
        }
    }
}

impl Measure {
    /// All.
    pub(crate) const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Random1, Self::Random8];

    /// One word.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Random1 => "random1",
            Self::Random8 => "random8",
        }
    }

    const fn title(self) -> &'static str {
        match self {
            Self::Read => "read 1 MiB",
            Self::Write => "write 1 MiB",
            Self::Random1 => "random read 4 KiB",
            Self::Random8 => "the same, 8 threads",
        }
    }

    /// Whether short requests are counted instead of bytes.
    const fn counts(self) -> bool {
        matches!(self, Self::Random1 | Self::Random8)
    }
}

/// One measurement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sample {
    /// Counted from 0.
    pub(crate) round: u32,
    /// By which way.
    pub(crate) way: Way,
    /// With what.
    pub(crate) method: Method,
    /// Of what.
    pub(crate) measure: Measure,
    /// Bytes per second; short requests per second where those are counted.
    pub(crate) value: f64,
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (way, method, measure) = (self.way.word(), self.method.word(), self.measure.word());
        write!(f, "{} {way} {method} {measure} {:.3}", self.round, self.value)
    }
}

impl Sample {
    /// What a line of the console says; `None` if it is no measurement.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (_, text) = line.split_once(MARK)?;
        let mut words = text.split_ascii_whitespace();
        let mut word = || words.next();
        let round = word()?.parse().ok()?;
        let (way, method, measure) = (word()?, word()?, word()?);
        let sample = Self {
            round,
            way: Way::ALL.into_iter().find(|one| one.word() == way)?,
            method: Method::ALL.into_iter().find(|one| one.word() == method)?,
            measure: Measure::ALL.into_iter().find(|one| one.word() == measure)?,
            value: word()?.parse().ok()?,
        };
        (word().is_none() && sample.value.is_finite() && sample.value > 0.0).then_some(sample)
    }

    /// Bytes per second.
    fn rate(&self) -> f64 {
        if self.measure.counts() {
            self.value * SHORT as f64
        } else {
            self.value
        }
    }
}

/// What one way, method and measure gave, over all rounds. The ratios are medians of the rounds' ratios: what slows a whole
/// round down is not seen in them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Row {
    /// By which way.
    pub(crate) way: Way,
    /// With what.
    pub(crate) method: Method,
    /// Of what.
    pub(crate) measure: Measure,
    /// The median, as [`Sample::value`].
    pub(crate) value: f64,
    /// The lowest and the highest.
    pub(crate) range: [f64; 2],
    /// Its bytes per second against those of raw TCP by the same way, in the same direction.
    pub(crate) of_tcp: f64,
    /// Against raw TCP by the same way with requests and answers of the same sizes.
    pub(crate) of_pattern: f64,
    /// Against nbd-client and nbd-server by the same way.
    pub(crate) of_reference: f64,
    /// Against those without the tunnel.
    pub(crate) of_bare_reference: f64,
}

/// All rows for which there is everything.
pub(crate) fn rows(samples: &[Sample]) -> Vec<Row> {
    let mut rows = Vec::new();
    for measure in Measure::ALL {
        for way in Way::ALL {
            rows.extend(
                Method::ALL
                    .into_iter()
                    .filter_map(|method| row(samples, way, method, measure)),
            );
        }
    }
    rows
}

fn row(samples: &[Sample], way: Way, method: Method, measure: Measure) -> Option<Row> {
    let own: Vec<_> = find(samples, way, method, measure).collect();
    let against = |way, method, other: Measure, value: fn(&Sample) -> f64| {
        let ratios = own.iter().filter_map(|sample| {
            let base = find(samples, way, method, other).find(|base| base.round == sample.round)?;
            Some(value(sample) / value(base))
        });
        median(ratios.collect())
    };
    let direction = match measure {
        Measure::Write => Measure::Write,
        _ => Measure::Read,
    };
    let values: Vec<f64> = own.iter().map(|sample| sample.value).collect();
    Some(Row {
        way,
        method,
        measure,
        range: [
            values.iter().copied().reduce(f64::min)?,
            values.iter().copied().reduce(f64::max)?,
        ],
        value: median(values)?,
        of_tcp: against(way, Method::Tcp, direction, Sample::rate)?,
        of_pattern: against(way, Method::Tcp, measure, |sample| sample.value)?,
        of_reference: against(way, Method::NbdClient, measure, |sample| sample.value)?,
        of_bare_reference: against(Way::Bare, Method::NbdClient, measure, |sample| sample.value)?,
    })
}

fn find(samples: &[Sample], way: Way, method: Method, measure: Measure) -> impl Iterator<Item = &Sample> {
    samples
        .iter()
        .filter(move |sample| (sample.way, sample.method, sample.measure) == (way, method, measure))
}

/// The one in the middle, or the mean of the two there.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = values.get(values.len() / 2)?;
    let lower = values.get(values.len().saturating_sub(1) / 2)?;
    Some(f64::midpoint(*lower, *upper))
}

/// The rows as a table in Markdown.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| what | way | with | median | lowest–highest | of TCP's rate | of TCP alike | of nbd-client | of nbd-client, bare |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let show = |value: f64| {
            if row.measure.counts() {
                format!("{value:.0}")
            } else {
                format!("{:.1}", value / f64::from(1 << 20))
            }
        };
        let unit = if row.measure.counts() { "/s" } else { "MiB/s" };
        text.push_str(&format!(
            "| {} | {} | {} | {} {unit} | {}–{} | {:.2} | {:.2} | {:.2} | {:.2} |\n",
            row.measure.title(),
            row.way.word(),
            row.method.title(),
            show(row.value),
            show(row.range[0]),
            show(row.range[1]),
            row.of_tcp,
            row.of_pattern,
            row.of_reference,
            row.of_bare_reference,
        ));
    }
    text
}

/// The rows for programs. Values are bytes per second, or requests per second for `random1` and `random8`.
pub(crate) fn json(rows: &[Row]) -> serde_json::Value {
    rows.iter()
        .map(|row| {
            serde_json::json!({
                "way": row.way.word(),
                "method": row.method.word(),
                "measure": row.measure.word(),
                "median": row.value,
                "lowest": row.range[0],
                "highest": row.range[1],
                "of_tcp": row.of_tcp,
                "of_pattern": row.of_pattern,
                "of_reference": row.of_reference,
                "of_bare_reference": row.of_bare_reference,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(round: u32, way: Way, method: Method, measure: Measure, value: f64) -> Sample {
        Sample {
            round,
            way,
            method,
            measure,
            value,
        }
    }

    /// All of one round; `slow` divides everything.
    fn round(number: u32, slow: f64) -> Vec<Sample> {
        let mut samples = Vec::new();
        for (way, divisor) in [(Way::Bare, 1.0), (Way::Tunnel, 4.0)] {
            for (method, value) in Method::ALL.into_iter().zip([4096e3, 1024e3, 2048e3, 3072e3]) {
                for measure in Measure::ALL {
                    let size = if measure.counts() { SHORT as f64 } else { 1.0 };
                    samples.push(sample(number, way, method, measure, value / divisor / size / slow));
                }
            }
        }
        samples
    }

    #[test]
    fn a_line_is_found_behind_what_the_kernel_put_before_it() {
        let expected = sample(2, Way::Tunnel, Method::NbdClient, Measure::Random8, 1234.5);
        assert_eq!(
            Sample::parse("[ 1.0] bench: 2 tunnel nbd-client random8 1234.500"),
            Some(expected)
        );
    }

    #[test]
    fn what_is_no_measurement_is_none() {
        for line in [
            "",
            "bench: done",
            "bench: ERROR nbd: no",
            "0 bare tcp read 1",
            "bench: 0 bare tcp read",
            "bench: 0 bare tcp read NaN",
            "bench: 0 bare tcp read inf",
            "bench: 0 bare tcp read 0.000",
            "bench: 0 bare tcp read 1 2",
            "bench: -1 bare tcp read 1",
            "bench: 0 bare tcp reads 1",
        ] {
            assert_eq!(Sample::parse(line), None, "{line}");
        }
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![5.0]), Some(5.0));
        assert_eq!(median(vec![9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 9.0]), Some(3.0));
    }

    #[test]
    fn a_slow_round_changes_no_ratio() {
        let samples = [round(0, 1.0), round(1, 7.0), round(2, 1.0)].concat();
        let rows = rows(&samples);
        assert_eq!(rows.len(), 32);
        for row in rows {
            let (tcp, reference) = match row.method {
                Method::Tcp => (1.0, 4.0),
                Method::NbdClient => (0.25, 1.0),
                Method::Nbd => (0.5, 2.0),
                Method::Nvme => (0.75, 3.0),
            };
            let bare = if row.way == Way::Bare {
                reference
            } else {
                reference / 4.0
            };
            let got = [row.of_tcp, row.of_pattern, row.of_reference, row.of_bare_reference];
            for (got, expected) in got.into_iter().zip([tcp, tcp, reference, bare]) {
                assert!((got - expected).abs() < 1e-9, "{row:?}");
            }
            assert!(row.range[0] < row.value && (row.value - row.range[1]).abs() < 1e-9);
        }
    }

    #[test]
    fn without_its_reference_a_row_is_left_out() {
        let mut samples = round(0, 1.0);
        samples.retain(|sample| sample.method != Method::NbdClient || sample.measure != Measure::Write);
        assert_eq!(rows(&samples).len(), 32 - 8);
    }

    #[test]
    fn the_table_has_a_line_per_row_with_units() {
        let mut samples = round(0, 1.0);
        samples[0].value = f64::from(10 << 20);
        let text = table(&rows(&samples));
        assert_eq!(text.lines().count(), 34);
        assert!(
            text.contains("| read 1 MiB | bare | raw TCP | 10.0 MiB/s | 10.0–10.0 | 1.00 |"),
            "{text}"
        );
        assert!(
            text.contains("| random read 4 KiB | tunnel | stiefel, NVMe | 188 /s |"),
            "{text}"
        );
    }

    proptest! {
        #[test]
        fn a_sample_survives_the_console(round in 0_u32..1000, way in 0_usize..2, method in 0_usize..4, measure in 0_usize..4, value in 1_u32..) {
            let sample = sample(round, Way::ALL[way], Method::ALL[method], Measure::ALL[measure], f64::from(value) / 8.0);
            prop_assert_eq!(Sample::parse(&format!("{MARK}{sample}")), Some(sample));
        }

        #[test]
        fn no_line_is_fatal(line in ".*") {
            let _ = Sample::parse(&format!("{MARK}{line}"));
        }
    }
}
