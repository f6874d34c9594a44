//! Runs the tests, several at the same time.
//!
//! A test holds one of `--jobs` slots. One that is going to wait for long, while its machines do nothing, gives its slot back
//! for good: then another one begins. Of those that wait only so many are begun that something is left to do meanwhile.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use stiefel_tests::kit::Kit;
use stiefel_tests::scenario::Failure;
use stiefel_tests::{cache, stop};

/// How many of the tests that wait may run at the same time, for each slot: their machines take memory, and some time.
const WAITING: usize = 2;

/// A test.
pub(crate) struct Test {
    pub(crate) name: String,
    /// Only with `--full`.
    pub(crate) long: bool,
    /// It waits for long: see [`Bench::idle`].
    pub(crate) waits: bool,
    pub(crate) run: Box<Run>,
}

/// What a test does.
type Run = dyn Fn(&Bench) -> Result<(), Failure> + Send + Sync;

/// What every test gets.
pub(crate) struct Bench<'a> {
    pub(crate) kit: &'a Kit,
    /// The program under test.
    pub(crate) program: &'a Path,
    slots: &'a Slots,
    waits: bool,
    left: AtomicBool,
    notes: Mutex<String>,
}

impl Bench<'_> {
    /// Waits, where there is no condition to wait for and the machines have nothing to do. Other tests begin meanwhile.
    ///
    /// # Errors
    /// When a signal came.
    pub(crate) fn idle(&self, duration: Duration) -> Result<(), Failure> {
        self.leave();
        Ok(stop::pause(duration)?)
    }

    /// Something to be shown with the result.
    pub(crate) fn note(&self, text: &str) {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        notes.push_str(text);
        if !text.ends_with('\n') {
            notes.push('\n');
        }
    }

    fn leave(&self) {
        if !self.left.swap(true, Ordering::Relaxed) {
            self.slots.change(|free| free.work += 1);
        }
    }
}

impl Drop for Bench<'_> {
    fn drop(&mut self) {
        self.leave();
        if self.waits {
            self.slots.change(|free| free.waiting += 1);
        }
    }
}

/// What is free: slots for tests that work, and for tests that will wait.
struct Free {
    work: usize,
    waiting: usize,
}

struct Slots {
    free: Mutex<Free>,
    changed: Condvar,
}

impl Slots {
    fn change(&self, change: impl FnOnce(&mut Free)) {
        change(&mut self.free.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Waits for a slot, and takes the first of the tests that may begin.
    fn take<'a>(&self, tests: &mut Vec<&'a Test>) -> Option<&'a Test> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if free.work > 0 {
                let next = tests.iter().position(|test| !test.waits || free.waiting > 0);
                if next.is_some() || tests.is_empty() {
                    let test = tests.remove(next?);
                    free.work -= 1;
                    free.waiting -= usize::from(test.waits);
                    return Some(test);
                }
            }
            free = self.changed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Runs all; how many failed.
///
/// # Errors
/// When a signal came.
pub(crate) fn run(tests: &[&Test], kit: &Kit, program: &Path, jobs: usize, passed: &Passed) -> Result<usize, Failure> {
    let slots = Slots {
        free: Mutex::new(Free {
            work: jobs,
            waiting: jobs * WAITING,
        }),
        changed: Condvar::new(),
    };
    let failed = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let mut tests = tests.to_vec();
        while let Some(test) = slots.take(&mut tests) {
            if stop::check().is_err() {
                break;
            }
            let bench = Bench {
                kit,
                program,
                slots: &slots,
                waits: test.waits,
                left: AtomicBool::new(false),
                notes: Mutex::default(),
            };
            let failed = &failed;
            scope.spawn(move || {
                if !one(test, &bench, passed) {
                    failed.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    stop::check()?;
    Ok(failed.into_inner())
}

/// Runs one and says how it went.
fn one(test: &Test, bench: &Bench, passed: &Passed) -> bool {
    let begun = Instant::now();
    let result = (test.run)(bench).and_then(|()| passed.add(&test.name));
    let seconds = begun.elapsed().as_secs_f64();
    if stop::check().is_err() {
        return false;
    }
    let mut said = match &result {
        Ok(()) => format!("ok      {} ({seconds:.0} s)\n", test.name),
        Err(failure) => format!("FAILED  {} ({seconds:.0} s)\n{}\n", test.name, crate::chain(&**failure)),
    };
    let notes = bench.notes.lock().unwrap_or_else(PoisonError::into_inner);
    // Writing to a string does not fail.
    let _ = write!(said, "{notes}");
    print!("{said}");
    let _ = std::io::stdout().flush();
    result.is_ok()
}

/// The tests that have passed with these very programs.
pub(crate) struct Passed(PathBuf);

impl Passed {
    pub(crate) fn open(program: &Path) -> Result<Self, Failure> {
        let mut hasher = DefaultHasher::new();
        for program in [program, &std::env::current_exe()?] {
            std::fs::read(program)?.hash(&mut hasher);
        }
        Ok(Self(cache::dir()?.join(format!("passed-{:016x}", hasher.finish()))))
    }

    pub(crate) fn names(&self) -> Result<BTreeSet<String>, Failure> {
        match std::fs::read_to_string(&self.0) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeSet::new()),
            text => Ok(text?.lines().map(str::to_owned).collect()),
        }
    }

    /// In one write, for tests end at the same time.
    fn add(&self, name: &str) -> Result<(), Failure> {
        let mut file = std::fs::File::options().append(true).create(true).open(&self.0)?;
        Ok(file.write_all(format!("{name}\n").as_bytes())?)
    }
}
