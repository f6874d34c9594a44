//! The keys that a person presses at the laptop, and the question that its screen asks: one at a time.

use std::path::Path;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stiefel_sys::SYSFS;
use stiefel_sys::console::Console;
use stiefel_sys::keyboard::Keyboard;

use super::host::Host;

/// How long a question stands.
pub(super) const PATIENCE: Duration = Duration::from_mins(1);

/// Who may be at the laptop, to be asked; a seam, so that the host's rules can be tried without anybody.
pub(super) trait Person: Send + Sync {
    /// Asks, and waits for the answer, at most [`PATIENCE`].
    fn ask(&self, question: &str) -> Answer;
    /// What is being asked has settled itself.
    fn never_mind(&self);
}

/// What became of a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// Yes.
    Yes,
    /// No.
    No,
    /// Nobody has answered, or it has settled itself.
    Silence,
    /// It was not asked: nobody can answer, or another question stands.
    Unasked,
}

/// The person at the laptop's keyboard.
pub(super) struct Keys {
    console: &'static Console,
    state: Mutex<State>,
}

/// What keys mean.
enum State {
    /// There are none.
    Deaf,
    /// No question stands.
    Idle,
    /// One does; here its answer is waited for.
    Asked(Sender<Answer>),
}

impl Keys {
    pub(super) fn new(console: &'static Console) -> Self {
        Self {
            console,
            state: Mutex::new(State::Deaf),
        }
    }

    /// Follows the keyboard from now on. Without one the laptop serves all the same.
    pub(super) fn follow(self: Arc<Self>, host: Arc<Host>) {
        let mut keyboard = match Keyboard::open(Path::new("/dev"), Path::new(SYSFS)) {
            Ok(keyboard) => keyboard,
            Err(error) => {
                self.console.warn(&format!(
                    "this laptop hears no keys: {error}; its power key still works"
                ));
                return;
            }
        };
        *self.state() = State::Idle;
        self.console.info("keys: p asks the desktop to power off, h goes home");
        let console = self.console;
        let listen = move || {
            let error = loop {
                match keyboard.next(None) {
                    Ok(Some(key)) => self.press(key, &host),
                    Ok(None) => {}
                    Err(error) => break error,
                }
            };
            self.console.warn(&format!("no keys are heard any more: {error}"));
            *self.state() = State::Deaf;
        };
        if let Err(error) = std::thread::Builder::new().name("keys".to_owned()).spawn(listen) {
            console.warn(&format!("no keys are heard: {error}"));
        }
    }

    fn press(&self, key: char, host: &Host) {
        match key.to_ascii_lowercase() {
            'p' => host.power_off_pressed(),
            'h' => host.home_pressed(),
            'y' => self.answer(Answer::Yes),
            'n' => self.answer(Answer::No),
            _ => {}
        }
    }

    /// Answers the question that stands; without one the key means nothing.
    fn answer(&self, answer: Answer) {
        let mut state = self.state();
        if let State::Asked(waiting) = &*state {
            // Who asked may just have lost patience.
            let _ = waiting.send(answer);
            *state = State::Idle;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask_for(&self, question: &str, patience: Duration) -> Answer {
        let (tell, answer) = mpsc::channel();
        {
            let mut state = self.state();
            if !matches!(*state, State::Idle) {
                return Answer::Unasked;
            }
            *state = State::Asked(tell);
        }
        self.console.warn(question);
        answer.recv_timeout(patience).unwrap_or_else(|_| {
            self.answer(Answer::Silence);
            // It may have come at the last moment.
            answer.try_recv().unwrap_or(Answer::Silence)
        })
    }
}

impl Person for Keys {
    fn ask(&self, question: &str) -> Answer {
        self.ask_for(question, PATIENCE)
    }

    fn never_mind(&self) {
        self.answer(Answer::Silence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(state: State) -> Arc<Keys> {
        let console = Box::leak(Box::new(Console::open(Path::new("/none"), Path::new("/none"))));
        let keys = Keys::new(console);
        *keys.state() = state;
        Arc::new(keys)
    }

    #[test]
    fn one_question_stands_at_a_time_and_a_key_answers_it_once() {
        let keys = keys(State::Idle);
        // Nothing was asked yet.
        keys.answer(Answer::Yes);
        let asked = {
            let keys = Arc::clone(&keys);
            std::thread::spawn(move || keys.ask_for("?", Duration::MAX))
        };
        while !matches!(*keys.state(), State::Asked(_)) {
            std::thread::yield_now();
        }
        assert_eq!(keys.ask_for("?", Duration::MAX), Answer::Unasked);
        keys.answer(Answer::No);
        keys.answer(Answer::Yes);
        assert_eq!(asked.join().unwrap(), Answer::No);
        assert!(matches!(*keys.state(), State::Idle));
    }

    #[test]
    fn who_is_not_there_does_not_answer_and_without_keys_nobody_is_asked() {
        let idle = keys(State::Idle);
        assert_eq!(idle.ask_for("?", Duration::ZERO), Answer::Silence);
        assert!(matches!(*idle.state(), State::Idle));
        assert_eq!(keys(State::Deaf).ask_for("?", Duration::MAX), Answer::Unasked);
    }
}
