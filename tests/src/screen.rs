//! What a machine's screen shows, read from its picture as a camera would.
//!
//! Counterpart: `zbarimg` (zbar-tools), which knows nothing of us.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::process::{self, CommandError};
use crate::vm::{Vm, VmError};

/// Between two pictures.
const LOOK: Duration = Duration::from_secs(2);

/// The screen does not show what it should.
#[derive(Debug, thiserror::Error)]
pub enum ScreenError {
    /// There is no picture.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The decoder is missing.
    #[error("cannot read codes (package zbar-tools)")]
    Decoder(#[from] CommandError),
    /// What was looked for does not come.
    #[error("{name}: after {waited:?} no code on the screen says {wanted:?}, but {last:?}; picture: {picture}")]
    NotShown {
        /// The machine.
        name: String,
        /// How long, after stretching.
        waited: Duration,
        /// What was looked for.
        wanted: String,
        /// What the last picture said.
        last: String,
        /// The last picture.
        picture: String,
    },
}

/// Waits until a QR code on the screen says something with all these words, and returns all of it. Needs `.vga()`. The last picture
/// lies at `picture`.
///
/// # Errors
/// When it is not there within `deadline` (as under KVM).
pub fn wait_for_code(vm: &Vm, words: &[&str], picture: &Path, deadline: Duration) -> Result<String, ScreenError> {
    let waited = vm.accel().deadline(deadline);
    let end = Instant::now() + waited;
    loop {
        vm.screendump(picture)?;
        let said = codes(picture)?;
        if words.iter().all(|word| said.contains(word)) {
            return Ok(said);
        }
        if Instant::now() >= end {
            return Err(ScreenError::NotShown {
                name: vm.name().to_owned(),
                waited,
                wanted: words.join(" "),
                last: said,
                picture: picture.display().to_string(),
            });
        }
        thread::sleep(LOOK);
    }
}

/// What all QR codes of a picture say.
fn codes(picture: &Path) -> Result<String, CommandError> {
    let mut command = process::command("zbarimg")?;
    command.args(["--quiet", "--raw", "-Sdisable", "-Sqrcode.enable"]);
    // Its status says whether there was one.
    let output = process::output(command.arg(picture))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
