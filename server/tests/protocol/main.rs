//! Laptop and desktop against each other over loopback: discovery, session, bundle and goodbye, with a fake host
//! instead of a disk; and what strangers and damaged cables may do to them. Needs no privileges.

mod discovery;
mod fetch;
mod goodbye;
mod http;
mod laptop;
