//! autokexec: the service that waits for the dedicated NIC or an authenticated wake, and then leaves the laptop's OS.
//!
//! Counterpart: `init` in the ramdisk. Specification: design.md, "The way of a boot" 1–4. It never polls: uevents, datagrams and
//! the wall clock's jumps wake it. Each decision is one line in the journal. A trigger while one is followed is ignored. People hear
//! of it, and can stop it, by the control socket (`control`).

mod control;
mod keys;
pub(crate) mod leave;
mod log;
mod nics;
mod notify;
mod plug;
mod resume;
mod sessions;
mod wake;

use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use anyhow::Context;
use stiefel_shared::config::{self, Config};
use stiefel_shared::discovery::{State, Woken};
use stiefel_sys::link;
use stiefel_sys::uevent::{Monitor, Uevent, UeventError};

use crate::collect::KEYS_DIR;
use crate::reboot::{self, Left};
use crate::{guards, install};
pub use control::client::{ControlError, cancel};
pub use control::{Answer, FOLDER as CONTROL_FOLDER, Notice};
use control::{Control, Wish};
use leave::Step;
pub use leave::{LeaveError, Mode};
use nics::{Interface, Known, NetEvent, Nics};
pub use notify::notify;
use plug::Moment;
use wake::Wake;

/// What can happen to the service.
enum Event {
    Uevent(Uevent),
    /// Uevents were lost.
    Lost,
    /// Uevents cannot be had any more.
    Deaf(UeventError),
    /// The wall clock jumped; perhaps the machine was asleep.
    Clock,
    Woken(Woken),
    /// The folder of the keys has changed.
    Keys,
    /// Leaving has ended.
    Left(Result<(), LeaveError>),
    /// A user wants the laptop to stay.
    Stay(Wish),
}

/// Leaves the OS now: `stiefel serve`. When it returns `Ok`, the shutdown has begun, or the dry run has ended.
///
/// # Errors
/// [`LeaveError`]; the OS goes on as if nothing had been.
pub fn serve(config: &Config, mode: Mode) -> Result<(), LeaveError> {
    // Nobody else cancels it: the user's Ctrl-C ends the process.
    let (_keep, cancel) = mpsc::channel();
    if mode == Mode::Real {
        not_started();
    }
    leave::leave(config, mode, &cancel, &|_| {})
}

/// The service: `stiefel autokexec`. Ends only when it cannot go on, or has nothing to wait for.
///
/// # Errors
/// If the kernel's events cannot be had.
pub fn run(config: &Config, mode: Mode) -> anyhow::Result<()> {
    if let Some(refusal) = guards::on_a_link(Path::new("/")) {
        log::notice(format_args!("nothing to do on a desktop: {refusal}"));
        return Ok(());
    }
    // Whatever the method is now.
    not_started();
    let (sender, events) = mpsc::channel();
    let known = nics::dedicated(&config.trigger);
    // The monitor is opened before the list is taken, so that nothing falls between.
    let monitor = Monitor::open()?;
    let nics = Nics::new(known.clone(), &interfaces()?, Moment::now());
    let wake = match config.trigger.wake {
        config::Wake::Off => None,
        config::Wake::Wired => listen(known.clone(), &sender),
    };
    if known.is_empty() && wake.is_none() {
        log::warning(format_args!(
            "there is nothing to wait for: set trigger.macs or trigger.usb in config.yaml, or let trigger.wake be wired"
        ));
        return Ok(());
    }
    for guard in install::missing_guards(Path::new("/"), &config.trigger) {
        log::warning(format_args!(
            "{guard} is not there, or not as config.yaml wants it, so a network manager may use the dedicated NIC; run `stiefel install` again"
        ));
    }
    if wake.is_some() {
        watch_keys(sender.clone())?;
    }
    watch_uevents(monitor, sender.clone())?;
    watch_clock(sender.clone())?;
    let control = Control::new(Path::new(sessions::SESSIONS));
    let wishes = sender.clone();
    let wished = move |wish| drop(wishes.send(Event::Stay(wish)));
    if let Err(error) = control.listen(Path::new(control::FOLDER), wished) {
        log::warning(format_args!(
            "nobody can be told of a countdown, and `stiefel cancel` will not work: there is no socket in {}: {error}",
            control::FOLDER
        ));
    }
    Service {
        config: config.clone(),
        mode,
        nics,
        wake,
        sender,
        control,
        leaving: None,
    }
    .run(&events)
}

/// The firmware may not have started the one-time image: its keys must not stay on the disk.
fn not_started() {
    match reboot::sweep(Path::new("/"), false) {
        Ok(Left::Nothing) => {}
        Ok(Left::Unseen(point)) => log::warning(format_args!(
            "the one-time image of an earlier trigger may be on the EFI system partition, which is not mounted at {point} as it was then, and \
             would hold keys; mount it and restart the service"
        )),
        Ok(Left::Image(_)) => log::warning(format_args!(
            "the firmware has not started the one-time image of an earlier trigger, or it failed early; the image was removed. If that \
             happens again, set trigger.method to kexec"
        )),
        Err(error) => log::warning(format_args!(
            "a one-time image of an earlier trigger may be left on the EFI system partition: {error:#}"
        )),
    }
}

/// Listens for wakes; what is missing for that is told, and plugs still count.
fn listen(known: Vec<Known>, sender: &Sender<Event>) -> Option<Wake> {
    let (woken, wakes) = mpsc::channel();
    let sender = sender.clone();
    let forward = move || {
        wakes
            .into_iter()
            .try_for_each(|woken| sender.send(Event::Woken(woken)).ok())
    };
    let listening = wake::listen(known, woken).and_then(|wake| {
        thread::Builder::new().name("wakes".to_owned()).spawn(forward)?;
        Ok(wake)
    });
    listening
        .map_err(|error| log::warning(format_args!("no wake is heard: {error:#}")))
        .ok()
}

fn interfaces() -> anyhow::Result<Vec<Interface>> {
    Ok(link::list()?.iter().map(Interface::of).collect())
}

fn watch_uevents(mut monitor: Monitor, sender: Sender<Event>) -> anyhow::Result<()> {
    let watch = move || {
        loop {
            let event = match monitor.next(None) {
                Ok(Some(event)) if nics::net_event(&event).is_none() => continue,
                Ok(Some(event)) => Event::Uevent(event),
                Ok(None) => continue,
                Err(UeventError::Lost) => Event::Lost,
                Err(error) => {
                    let _ = sender.send(Event::Deaf(error));
                    return;
                }
            };
            if sender.send(event).is_err() {
                return;
            }
        }
    };
    thread::Builder::new()
        .name("uevents".to_owned())
        .spawn(watch)
        .context("cannot start a thread")?;
    Ok(())
}

fn watch_keys(sender: Sender<Event>) -> anyhow::Result<()> {
    let watch = move || {
        if let Err(error) = keys::watch(Path::new(KEYS_DIR), || sender.send(Event::Keys).is_ok()) {
            log::warning(format_args!(
                "changes of {KEYS_DIR} are not seen ({error}); restart the service after making a key"
            ));
        }
    };
    thread::Builder::new()
        .name("keys".to_owned())
        .spawn(watch)
        .context("cannot start a thread")?;
    Ok(())
}

fn watch_clock(sender: Sender<Event>) -> anyhow::Result<()> {
    let clock = resume::ClockWatch::new().context("cannot watch the clock for resumes")?;
    let watch = move || {
        while clock.wait().is_ok() && sender.send(Event::Clock).is_ok() {}
    };
    thread::Builder::new()
        .name("clock".to_owned())
        .spawn(watch)
        .context("cannot start a thread")?;
    Ok(())
}

struct Service {
    config: Config,
    mode: Mode,
    nics: Nics,
    wake: Option<Wake>,
    sender: Sender<Event>,
    control: Control,
    leaving: Option<Leaving>,
}

/// A trigger that is followed.
struct Leaving {
    cancel: Sender<String>,
    /// It was triggered by a plug, so unplugging cancels it.
    by_plug: bool,
    /// Users who want it stopped, and wait for what becomes of that.
    asked: Vec<Sender<Answer>>,
    /// The shutdown has begun.
    gone: bool,
}

impl Service {
    fn run(mut self, events: &Receiver<Event>) -> anyhow::Result<()> {
        // It never ends by itself: `self` holds a sender.
        for event in events {
            match event {
                Event::Uevent(event) => self.uevent(&event),
                Event::Lost => {
                    log::warning(format_args!("device events were lost; looking at all interfaces again"));
                    self.nics.resynchronise(&interfaces()?, Moment::now());
                }
                Event::Deaf(error) => return Err(error.into()),
                Event::Clock => self.nics.clock(Moment::now()),
                Event::Woken(woken) => self.woken(&woken),
                Event::Keys => {
                    if let Some(wake) = &mut self.wake
                        && wake.reload()
                    {
                        log::notice(format_args!(
                            "the keys have changed: {} may wake the laptop",
                            wake.count()
                        ));
                    }
                }
                Event::Left(result) => self.left(&result),
                Event::Stay(wish) => self.stay(wish),
            }
        }
        Ok(())
    }

    fn woken(&mut self, woken: &Woken) {
        if !self.wake.as_mut().is_some_and(|wake| wake.may_wake(&woken.key)) {
            log::warning(format_args!(
                "a wake from {} is ignored: its key {} was revoked or replaced",
                woken.peer, woken.key
            ));
            // The answer has said that the laptop is on its way.
            if self.leaving.is_none() {
                self.say(State::Asleep);
            }
            return;
        }
        self.trigger(&format!("a wake from {} with the key {}", woken.peer, woken.key), false);
    }

    fn uevent(&mut self, event: &Uevent) {
        let now = Moment::now();
        match nics::net_event(event) {
            Some(NetEvent::Added(index)) => {
                let links = match link::list() {
                    Ok(links) => links,
                    Err(error) => {
                        log::error(format_args!(
                            "interface {index} has appeared, but cannot be looked at: {error}; unplug it and plug it in again"
                        ));
                        return;
                    }
                };
                // One that is gone again tells of that by its next event.
                let Some(link) = links.iter().find(|link| link.index == index) else {
                    return;
                };
                let interface = Interface::of(link);
                if self.nics.is_news_of_a_stranger(&interface) {
                    log::debug(format_args!(
                        "{} has appeared, and means nothing: neither trigger.macs nor trigger.usb in config.yaml names it",
                        link.name
                    ));
                }
                if let Some(known) = self.nics.appeared(&interface, now) {
                    self.trigger(
                        &format!("the dedicated NIC {known} was plugged in ({})", link.name),
                        true,
                    );
                }
            }
            Some(NetEvent::Removed(index)) => {
                self.nics.disappeared(index, now);
                if let Some(leaving) = self.leaving.as_ref().filter(|leaving| leaving.by_plug)
                    && !self.nics.any_present()
                {
                    // Heard only during the countdown; later the NIC's return is waited for in the ramdisk.
                    let _ = leaving.cancel.send("the dedicated NIC was unplugged".to_owned());
                }
            }
            None => {}
        }
    }

    fn trigger(&mut self, why: &str, by_plug: bool) {
        if self.leaving.is_some() {
            log::info(format_args!(
                "ignored, because another trigger is being followed: {why}"
            ));
            return;
        }
        log::notice(format_args!("triggered: {why}"));
        self.say(State::Waking);
        let (cancel, cancelled) = mpsc::channel();
        let (config, mode, sender) = (self.config.clone(), self.mode, self.sender.clone());
        let (control, why) = (self.control.clone(), why.to_owned());
        let leave = move || {
            let tell = |step| {
                let why = why.clone();
                control.tell(&match step {
                    Step::Countdown(time) => Notice::Countdown {
                        seconds: time.as_secs(),
                        why,
                    },
                    Step::Leaving => Notice::Leaving { why },
                });
            };
            let _ = sender.send(Event::Left(leave::leave(&config, mode, &cancelled, &tell)));
        };
        match thread::Builder::new().name("leave".to_owned()).spawn(leave) {
            Ok(_) => {
                self.leaving = Some(Leaving {
                    cancel,
                    by_plug,
                    asked: Vec::new(),
                    gone: false,
                });
            }
            Err(error) => {
                log::error(format_args!("cannot start a thread: {error}"));
                self.say(State::Asleep);
            }
        }
    }

    /// A user wants the laptop to stay. What becomes of it is known when leaving has ended.
    fn stay(&mut self, wish: Wish) {
        let Wish { who, answer } = wish;
        let answered = match &mut self.leaving {
            None => Answer::Idle,
            Some(leaving) if leaving.gone => Answer::TooLate,
            Some(leaving) => {
                // One that has ended already says so by its next event.
                let _ = leaving.cancel.send(format!("by {who}"));
                leaving.asked.push(answer);
                return;
            }
        };
        log::info(format_args!(
            "{who} wants to stay in this system: {}",
            match answered {
                Answer::TooLate => "too late, the shutdown has begun",
                _ => "nothing had been triggered",
            }
        ));
        let _ = answer.send(answered);
    }

    fn left(&mut self, result: &Result<(), LeaveError>) {
        let asked = self.leaving.as_mut().map(|leaving| std::mem::take(&mut leaving.asked));
        let answer = |answer: Answer| {
            for asked in asked.into_iter().flatten() {
                let _ = asked.send(answer.clone());
            }
        };
        match result {
            // From now on systemd ends us; a new trigger has nothing to add.
            Ok(()) if self.mode == Mode::Real => {
                self.leaving.iter_mut().for_each(|leaving| leaving.gone = true);
                answer(Answer::TooLate);
                return;
            }
            Ok(()) => answer(Answer::TooLate),
            Err(error) => {
                let mut text = error.to_string();
                let mut cause = std::error::Error::source(error);
                while let Some(source) = cause {
                    text += &format!("\n  because: {source}");
                    cause = source.source();
                }
                log::error(format_args!("staying in this system: {text}"));
                match error {
                    LeaveError::Cancelled { why } => {
                        answer(Answer::Cancelled);
                        self.control.tell(&Notice::Cancelled { why: why.clone() });
                    }
                    _ => {
                        answer(Answer::StaysAnyway { why: text.clone() });
                        self.control.tell(&Notice::Refused { why: text });
                    }
                }
            }
        }
        self.leaving = None;
        self.say(State::Asleep);
    }

    /// Tells those who ask over the network what the laptop is doing.
    fn say(&self, state: State) {
        if let Some(wake) = &self.wake {
            wake.set_state(state);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::mpsc::TryRecvError;
    use std::time::Duration;

    use super::*;

    const INDEX: u32 = 7;

    /// A service that follows a plug of the interface [`INDEX`], and what it sends to who leaves.
    fn leaving(mode: Mode) -> (Service, Receiver<Event>, Receiver<String>) {
        let (sender, events) = mpsc::channel();
        let (cancel, cancelled) = mpsc::channel();
        let mac = [2, 0, 0, 0, 0, 1];
        let nic = Interface {
            index: INDEX,
            macs: vec![mac],
            usb: None,
        };
        let long_ago = Moment {
            awake: Duration::ZERO,
            boot: Duration::ZERO,
            login: None,
        };
        let service = Service {
            config: Config::default(),
            mode,
            nics: Nics::new(vec![Known::Mac(config::Mac(mac))], &[nic], long_ago),
            wake: None,
            sender,
            control: Control::new(Path::new("/nonexistent")),
            leaving: Some(Leaving {
                cancel,
                by_plug: true,
                asked: Vec::new(),
                gone: false,
            }),
        };
        (service, events, cancelled)
    }

    fn removed(index: u32) -> Uevent {
        Uevent {
            action: "remove".into(),
            devpath: "/devices/x/net/usb0".into(),
            subsystem: Some("net".into()),
            fields: BTreeMap::from([("IFINDEX".into(), index.to_string())]),
        }
    }

    #[test]
    fn a_second_trigger_is_ignored_while_one_is_followed() {
        let (mut service, events, _cancelled) = leaving(Mode::DryRun);
        service.trigger("a wake", false);
        assert!(
            service.leaving.as_ref().is_some_and(|leaving| leaving.by_plug),
            "still the first"
        );
        drop(service);
        assert!(
            matches!(events.try_recv(), Err(TryRecvError::Disconnected)),
            "nobody else was sent to leave"
        );
    }

    #[test]
    fn unplugging_the_dedicated_nic_cancels_what_its_plug_began() {
        let (mut service, _events, cancelled) = leaving(Mode::Real);
        service.uevent(&removed(INDEX + 1));
        assert!(cancelled.try_recv().is_err());
        service.uevent(&removed(INDEX));
        assert!(cancelled.try_recv().is_ok());
    }

    #[test]
    fn unplugging_does_not_cancel_what_a_wake_began() {
        let (mut service, _events, cancelled) = leaving(Mode::Real);
        service.leaving.iter_mut().for_each(|leaving| leaving.by_plug = false);
        service.uevent(&removed(INDEX));
        assert!(cancelled.try_recv().is_err());
    }

    #[test]
    fn after_a_refusal_the_next_trigger_counts_and_after_a_shutdown_none() {
        let refused = || Err(LeaveError::Cancelled { why: "x".into() });
        let (mut service, _events, _cancelled) = leaving(Mode::Real);
        service.left(&Ok(()));
        assert!(service.leaving.is_some());
        service.left(&refused());
        assert!(service.leaving.is_none());
        let (mut service, _events, _cancelled) = leaving(Mode::DryRun);
        service.left(&Ok(()));
        assert!(service.leaving.is_none());
    }

    /// What a user who wants to stay is told, or not yet.
    fn wish(service: &mut Service) -> Receiver<Answer> {
        let (answer, answered) = mpsc::channel();
        service.stay(Wish {
            who: "root".to_owned(),
            answer,
        });
        answered
    }

    #[test]
    fn a_users_wish_cancels_what_was_triggered_and_is_answered_at_its_end() {
        let refusal = || LeaveError::Refused { refusals: Vec::new() };
        for (end, expected) in [
            (Err(LeaveError::Cancelled { why: "by root".into() }), Answer::Cancelled),
            (
                Err(refusal()),
                Answer::StaysAnyway {
                    why: refusal().to_string(),
                },
            ),
            (Ok(()), Answer::TooLate),
        ] {
            let (mut service, _events, cancelled) = leaving(Mode::Real);
            let (first, second) = (wish(&mut service), wish(&mut service));
            assert_eq!(cancelled.try_recv().unwrap(), "by root");
            assert!(first.try_recv().is_err(), "not known yet");
            service.left(&end);
            assert_eq!(first.try_recv().unwrap(), expected);
            assert_eq!(second.try_recv().unwrap(), expected);
        }
    }

    #[test]
    fn a_users_wish_without_a_trigger_or_after_the_shutdown_has_begun_is_answered_at_once() {
        let (mut service, _events, _cancelled) = leaving(Mode::Real);
        service.left(&Ok(()));
        assert_eq!(wish(&mut service).try_recv().unwrap(), Answer::TooLate);
        let (mut service, _events, _cancelled) = leaving(Mode::Real);
        service.left(&Err(LeaveError::Cancelled { why: "x".into() }));
        assert_eq!(wish(&mut service).try_recv().unwrap(), Answer::Idle);
    }
}
