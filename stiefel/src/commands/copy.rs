//! `stiefel copy`: a disk or image to another.

use std::io::{Write, stderr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use stiefel_client::copy::{self, Copy, Progress, Report};
use stiefel_sys::process;

use super::{Stopped, ask, mebibytes};
use crate::cli::CopyArgs;

/// Added to a signal's number in the exit status, as shells do.
const BY_SIGNAL: i32 = 128;
/// Where the state of copies to devices is kept.
const STATE: &str = "/var/lib/stiefel";

/// Copies, and says what came of it.
pub(crate) fn copy(args: &CopyArgs) -> anyhow::Result<()> {
    let state = match &args.state {
        Some(state) => state.clone(),
        None => copy::usual_state(&args.target, Path::new(STATE)),
    };
    let goes_on = state.exists();
    if args.state.is_none() && state.starts_with(STATE) {
        std::fs::create_dir_all(STATE).with_context(|| format!("cannot make {STATE}; name a file with --state"))?;
    }
    let bar = ProgressBar::new(0);
    let style = |verb: &str| {
        ProgressStyle::with_template(&format!(
            "{verb} {{wide_bar}} {{bytes}}/{{total_bytes}} {{bytes_per_sec}} {{eta}}"
        ))
    };
    let (copying, comparing) = (style("copying  ")?, style("comparing")?);
    bar.set_style(copying);
    let mut compared = false;
    let mut stops = Stops::default();
    let mut hears = |progress| {
        if let Some(signal) = stops.came() {
            return Err(Stopped(signal).into());
        }
        let (done, total) = match progress {
            Progress::Begins(there) => {
                if there && !args.yes {
                    may_be_lost(args, goes_on)?;
                }
                // From here on; an unanswered question has nothing to end in order.
                return stops.listen().context("cannot listen to signals");
            }
            Progress::Copied(done, total) => (done, total),
            Progress::Compared(done, total) => {
                if !std::mem::replace(&mut compared, true) {
                    bar.set_style(comparing.clone());
                    bar.reset_eta();
                }
                (done, total)
            }
        };
        bar.set_length(total);
        bar.set_position(done);
        Ok(())
    };
    let job = Copy {
        source: &args.source,
        target: &args.target,
        state: &state,
        skip_errors: args.skip_errors,
    };
    let report = copy::copy(&job, &mut hears)?;
    bar.finish_and_clear();
    if args.target.is_file() {
        copy::sync_folder(&args.target)?;
    }
    tell(args, &report);
    Ok(())
}

fn tell(args: &CopyArgs, report: &Report) {
    for (offset, length) in &report.unreadable {
        // The only list there is, by now: with nobody to read it here, it may still be read as JSON.
        let _ = writeln!(
            stderr(),
            "stiefel: {length} bytes at {offset} could not be read and are zeroes in the copy"
        );
    }
    let _ = writeln!(
        stderr(),
        "{} copied and compared, {} of it zeroes, {} from an earlier try",
        mebibytes(report.size),
        mebibytes(report.zeroes),
        mebibytes(report.resumed)
    );
    if args.json {
        let report = serde_json::json!({
            "size": report.size, "zeroes": report.zeroes, "resumed": report.resumed, "sha256": report.sha256,
            "unreadable": report.unreadable,
        });
        println!("{report}");
    } else {
        println!("{}  {}", report.sha256, args.target.display());
    }
}

/// Asks whether what is on the target may be lost; also when the copy goes on: another disk may have the name by now.
fn may_be_lost(args: &CopyArgs, goes_on: bool) -> anyhow::Result<()> {
    let (source, target) = (args.source.display(), args.target.display());
    let question = match goes_on {
        true => {
            format!("Go on copying {source} onto {target}? All of {target} is lost if it is another one than before.")
        }
        false => format!("All of {target} is lost. Copy {source} onto it?"),
    };
    if !ask(&question)? {
        bail!("nothing was written");
    }
    Ok(())
}

/// Signals that end the copy in order.
#[derive(Default)]
struct Stops(Vec<(i32, Arc<AtomicBool>)>);

impl Stops {
    /// From now on the first of its kind is noted, and a second one ends the program at once: a disk may hang. Who had one ignored, as
    /// `nohup` does, still has.
    fn listen(&mut self) -> std::io::Result<()> {
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            if !process::is_ignored(signal) {
                let came = Arc::new(AtomicBool::new(false));
                flag::register_conditional_shutdown(signal, BY_SIGNAL + signal, Arc::clone(&came))?;
                flag::register(signal, Arc::clone(&came))?;
                self.0.push((signal, came));
            }
        }
        Ok(())
    }

    fn came(&self) -> Option<i32> {
        let came = self.0.iter().find(|(_, came)| came.load(Ordering::Relaxed));
        came.map(|(signal, _)| *signal)
    }
}
