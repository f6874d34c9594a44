//! QEMU's machine protocol: commands and events as lines of JSON over a unix socket.
//!
//! Counterpart: QEMU (docs/interop/qmp-spec). A thread of its own reads; answers are found by their id, events are kept
//! until someone waits for them.

use std::collections::{HashMap, VecDeque};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

/// The longest line taken from QEMU, in bytes.
const MAX_LINE: u64 = 4 << 20;
/// How many events are kept; the oldest go first.
const MAX_EVENTS: usize = 10_000;

/// Why QEMU did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket failed.
    #[error("cannot talk to QEMU")]
    Io {
        /// Why.
        #[from]
        source: io::Error,
    },
    /// QEMU refused the command.
    #[error("QEMU refuses {command}: {reason}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's words.
        reason: String,
    },
    /// QEMU has ended.
    #[error("QEMU ended while waiting for {what}")]
    Ended {
        /// What was waited for.
        what: String,
    },
    /// Nothing came in time.
    #[error("no {what} from QEMU within {waited:?}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
    },
}

/// Something QEMU told by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, as `RESET`.
    pub name: String,
    /// What it carries; `Null` if nothing.
    pub data: Value,
}

/// A connection to one QEMU.
pub struct Qmp {
    writer: Mutex<UnixStream>,
    shared: Arc<Shared>,
    patience: Duration,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    next_id: u64,
    answers: HashMap<u64, Result<Value, String>>,
    events: VecDeque<Event>,
    ended: bool,
}

impl Qmp {
    /// Takes over a connected socket; every command must be answered within `patience`.
    ///
    /// # Errors
    /// When QEMU does not greet, or refuses the protocol.
    pub fn new(stream: UnixStream, patience: Duration) -> Result<Self, QmpError> {
        let shared = Arc::new(Shared::default());
        let reader = stream.try_clone()?;
        let for_reader = Arc::clone(&shared);
        std::thread::spawn(move || for_reader.read(reader));
        let qmp = Self {
            writer: Mutex::new(stream),
            shared,
            patience,
        };
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs one command and returns its answer.
    ///
    /// # Errors
    /// When QEMU refuses it, has ended, or does not answer.
    pub fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let id = {
            let mut state = self.shared.lock();
            state.next_id += 1;
            state.next_id
        };
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments, "id": id }));
        let sent = self
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(line.as_bytes());
        if let Err(source) = sent {
            // A QEMU that just ended says so by a broken pipe.
            return Err(match source.kind() {
                io::ErrorKind::BrokenPipe => QmpError::Ended {
                    what: command.to_owned(),
                },
                _ => source.into(),
            });
        }
        self.shared
            .wait(&format!("answer to {command}"), self.patience, |state| {
                state.answers.remove(&id)
            })?
            .map_err(|reason| QmpError::Refused {
                command: command.to_owned(),
                reason,
            })
    }

    /// Waits for an event with this name that `wanted` accepts, and takes it.
    ///
    /// Events are kept from the start on, so one that came before the call counts.
    ///
    /// # Errors
    /// When none comes within `deadline`, or QEMU ends.
    pub fn wait_event(
        &self,
        name: &str,
        wanted: impl Fn(&Value) -> bool,
        deadline: Duration,
    ) -> Result<Event, QmpError> {
        self.shared.wait(name, deadline, |state| {
            let index = state
                .events
                .iter()
                .position(|event| event.name == name && wanted(&event.data))?;
            state.events.remove(index)
        })
    }

    /// Every event not yet taken, oldest first.
    pub fn events(&self) -> Vec<Event> {
        self.shared.lock().events.iter().cloned().collect()
    }

    /// Forgets all events that came until now.
    pub fn forget_events(&self) {
        self.shared.lock().events.clear();
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        // The reader thread sees the end and goes.
        let _ = self
            .writer
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .shutdown(std::net::Shutdown::Both);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `take` finds something.
    fn wait<T>(
        &self,
        what: &str,
        patience: Duration,
        mut take: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, QmpError> {
        let end = Instant::now() + patience;
        let mut state = self.lock();
        loop {
            if let Some(found) = take(&mut state) {
                return Ok(found);
            }
            if state.ended {
                return Err(QmpError::Ended { what: what.to_owned() });
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(QmpError::Timeout {
                    what: what.to_owned(),
                    waited: patience,
                });
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn read(&self, stream: UnixStream) {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        loop {
            line.clear();
            match reader.by_ref().take(MAX_LINE).read_line(&mut line) {
                Ok(count) if count > 0 => self.lock().take_line(&line),
                _ => break,
            }
            self.changed.notify_all();
        }
        self.lock().ended = true;
        self.changed.notify_all();
    }
}

impl State {
    /// Files one line; what is neither an answer nor an event (the greeting) is dropped.
    fn take_line(&mut self, line: &str) {
        let Ok(Value::Object(mut message)) = serde_json::from_str::<Value>(line) else {
            return;
        };
        if let Some(Value::String(name)) = message.remove("event") {
            if self.events.len() >= MAX_EVENTS {
                self.events.pop_front();
            }
            self.events.push_back(Event {
                name,
                data: message.remove("data").unwrap_or_default(),
            });
        } else if let Some(id) = message.get("id").and_then(Value::as_u64) {
            self.answers.insert(id, answer(&mut message));
        }
    }
}

fn answer(message: &mut Map<String, Value>) -> Result<Value, String> {
    if let Some(value) = message.remove("return") {
        return Ok(value);
    }
    Err(message
        .get("error")
        .and_then(|error| error.get("desc"))
        .and_then(Value::as_str)
        .unwrap_or("no reason")
        .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    /// A QEMU that says `lines` after each command it gets, with `ID` replaced by the command's id.
    fn qmp_with(script: Vec<Vec<&'static str>>) -> Result<Qmp, QmpError> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut writer = theirs.try_clone().unwrap();
            writer
                .write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n")
                .unwrap();
            let mut commands = BufReader::new(theirs).lines();
            for lines in script {
                let command: Value = serde_json::from_str(&commands.next().unwrap().unwrap()).unwrap();
                for line in lines {
                    writeln!(writer, "{}", line.replace("ID", &command["id"].to_string())).unwrap();
                }
            }
        });
        Qmp::new(ours, SOON)
    }

    #[test]
    fn an_event_between_command_and_answer_is_kept() {
        let qmp = qmp_with(vec![
            vec![r#"{"return": {}, "id": ID}"#],
            vec![
                r#"{"event": "RESET", "data": {"guest": true}}"#,
                r#"{"return": 7, "id": ID}"#,
            ],
        ])
        .unwrap();
        assert_eq!(qmp.execute("query-x", json!({})).unwrap(), json!(7));
        assert_eq!(
            qmp.wait_event("RESET", |data| data["guest"] == true, SOON)
                .unwrap()
                .name,
            "RESET"
        );
        assert!(qmp.events().is_empty());
    }

    #[test]
    fn a_refusal_carries_qemus_words() {
        let qmp = qmp_with(vec![
            vec![r#"{"return": {}, "id": ID}"#],
            vec![r#"{"id": ID, "error": {"class": "GenericError", "desc": "no such device"}}"#],
        ])
        .unwrap();
        let error = qmp.execute("device_del", json!({"id": "u0"})).unwrap_err();
        assert_eq!(error.to_string(), "QEMU refuses device_del: no such device");
    }

    #[test]
    fn an_ended_qemu_is_reported_as_such() {
        let qmp = qmp_with(vec![vec![r#"{"return": {}, "id": ID}"#]]).unwrap();
        assert!(matches!(
            qmp.wait_event("SHUTDOWN", |_| true, SOON),
            Err(QmpError::Ended { .. })
        ));
    }

    #[test]
    fn nothing_in_time_is_a_timeout() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let result = Qmp::new(ours, Duration::from_millis(1));
        assert!(matches!(result, Err(QmpError::Timeout { .. })));
    }

    #[test]
    fn the_oldest_events_go_first() {
        let mut state = State::default();
        for number in 0..=MAX_EVENTS {
            state.take_line(&json!({ "event": "E", "data": number }).to_string());
        }
        assert_eq!(state.events.len(), MAX_EVENTS);
        assert_eq!(state.events[0].data, json!(1));
    }
}
