//! Who is logged in to this laptop, and how: systemd-logind's description of its sessions.
//!
//! Specification: sd-login(3), whose functions read the same files; `MONOTONIC` is what sd_session_get_start_time(3) is made from.
//! What is missing or not understood in a file counts as not so.

use std::path::Path;
use std::time::Duration;

/// Where logind describes sessions.
pub(super) const SESSIONS: &str = "/run/systemd/sessions";

/// One session, as far as it matters here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Session {
    /// Whose.
    pub uid: u32,
    /// A person's (not the login screen's, and nobody's jobs).
    pub is_users: bool,
    /// X11 or Wayland.
    pub is_graphical: bool,
    /// At this machine's own screen and keyboard, and what these show now.
    pub is_in_front: bool,
    /// When it began, by CLOCK_MONOTONIC.
    pub begun: Option<Duration>,
}

impl Session {
    fn parse(text: &str) -> Option<Self> {
        let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        let is = |name: &str, wanted: &str| value(name) == Some(wanted);
        Some(Self {
            uid: value("UID")?.parse().ok()?,
            // Also `user-early`, `user-light` and others of newer versions; `user-incomplete` has not logged in yet.
            is_users: value("CLASS")
                .is_some_and(|class| class == "user" || (class.starts_with("user-") && class != "user-incomplete")),
            is_graphical: matches!(value("TYPE"), Some("x11" | "wayland" | "mir")),
            is_in_front: is("ACTIVE", "1") && is("REMOTE", "0") && value("SEAT").is_some_and(|seat| !seat.is_empty()),
            begun: value("MONOTONIC")
                .and_then(|at| at.parse().ok())
                .map(Duration::from_micros),
        })
    }
}

/// All sessions; none where logind does not run.
pub(super) fn list(folder: &Path) -> Vec<Session> {
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten();
    // Beside each session's file lies a FIFO (`1.ref`): who reads that waits until the session ends.
    let files = names.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
    files
        .filter_map(|entry| Session::parse(&std::fs::read_to_string(entry.path()).ok()?))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FRONT: &str =
        "UID=1000\nUSER=a\nACTIVE=1\nREMOTE=0\nTYPE=wayland\nCLASS=user\nSEAT=seat0\nMONOTONIC=7000000\n";

    #[test]
    fn a_session_in_front_is_local_active_and_has_a_seat() {
        let session = Session::parse(FRONT).unwrap();
        let expected = Session {
            uid: 1000,
            is_users: true,
            is_graphical: true,
            is_in_front: true,
            begun: Some(Duration::from_secs(7)),
        };
        assert_eq!(session, expected);
        for (from, to) in [
            ("ACTIVE=1", "ACTIVE=0"),
            ("REMOTE=0", "REMOTE=1"),
            ("SEAT=seat0\n", ""),
            ("SEAT=seat0", "SEAT="),
            ("REMOTE=0\n", ""),
        ] {
            assert!(!Session::parse(&FRONT.replace(from, to)).unwrap().is_in_front, "{to}");
        }
        for class in [
            "greeter",
            "lock-screen",
            "background",
            "manager",
            "user-incomplete",
            "users",
        ] {
            let text = FRONT.replace("CLASS=user", &format!("CLASS={class}"));
            assert!(!Session::parse(&text).unwrap().is_users, "{class}");
        }
        assert!(
            Session::parse(&FRONT.replace("CLASS=user", "CLASS=user-early"))
                .unwrap()
                .is_users
        );
    }

    #[test]
    fn a_session_of_nobody_is_none() {
        assert_eq!(Session::parse(""), None);
        assert_eq!(Session::parse(&FRONT.replace("UID=1000", "UID=-1")), None);
        assert_eq!(Session::parse(&FRONT.replace("UID=1000", "XUID=1000")), None);
    }

    #[test]
    fn what_lies_beside_the_sessions_is_not_waited_for() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("1.ref");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        std::fs::write(dir.path().join("1"), FRONT).unwrap();
        let (done, listed) = std::sync::mpsc::channel();
        std::thread::spawn(move || done.send(list(dir.path())));
        let listed = listed.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!(listed, [Session::parse(FRONT).unwrap()]);
        assert_eq!(list(Path::new("/nonexistent")), []);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "([A-Z]{0,9}=?[ -~]{0,12}\n?){0,12}") {
            let _ = Session::parse(&text);
        }
    }
}
